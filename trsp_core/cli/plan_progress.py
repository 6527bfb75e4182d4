"""A plan at work on the command line: a line for each of its runs, as the driver tells of them."""

from collections.abc import Callable

from trsp_core import escaping, formatting
from trsp_core.cli import output, run_figures
from trsp_core.experiments import runner
from trsp_core.experiments.executors import Executor
from trsp_core.experiments.plans import Ends, Plan
from trsp_core.experiments.runner import PlanEvent
from trsp_core.runs.store import Store
from trsp_core.schema.events import DOMAINS

NEWS = {
    "found": "already there",
    "begun": "running",
    "going": "",
    "steered": "steered while it ran, so it does not count",
    "left out": "left out: what it needs has failed",
}


def work(plan: Plan, store: Store, executor: Executor, write: Callable[[Ends], None] = lambda ends: None) -> Ends:
    """Run what is missing, and return what has finished by variation.

    Args:
        write: called with what has finished so far, after each run that finishes and when all have.
    """
    total, line, ends = len(plan.variations), output.ProgressLine(), Ends()
    for news in runner.work(plan, store, executor):
        line.tell(_line(news, total), passing=news.kind == "going")
        if news.kind in ("found", "finished") and news.run and news.state:
            ends[news.variation.name] = (news.run, news.state)
            if news.kind == "finished" or len(ends) == total:
                write(ends)
    return ends


def _line(news: PlanEvent, total: int) -> str:
    """A run of a plan in one line: `[ 3/24] TRSP, steps 60: finished, perplexity 61.2 and 74.6; about 9:30 left`."""
    kind = NEWS.get(news.kind, formatting.status(news.kind))
    line = f"[{news.number:>{len(str(total))}}/{total}] {news.variation.title}: {kind}"
    if news.state and news.state.failure:
        line += f". {news.state.failure.message} {news.state.failure.remedy}"
    elif news.state and news.kind == "going":
        line += f" {run_figures.progress(news.state).partition(', about')[0]}"
    elif news.state and "pruned" in news.state.perplexity:
        perplexity = news.state.perplexity["pruned"]
        line += ", perplexity " + " and ".join(
            f"{formatting.perplexity(perplexity[d])} ({d})" for d in DOMAINS if d in perplexity
        )
    remaining = (
        f"; about {formatting.clock(news.seconds_left)} left for all"
        if news.seconds_left and news.kind != "found"
        else ""
    )
    return escaping.line(line) + remaining
