"""`sweep`: run what is missing of a grid; after each point its record is written anew."""

import signal
from collections.abc import Sequence
from pathlib import Path

import click

from trsp_core import escaping, formatting, paths
from trsp_core.cli import output, run_figures
from trsp_core.cli.command import command
from trsp_core.experiments import executors, grid_results, grids, runner
from trsp_core.experiments.grids import Grid
from trsp_core.experiments.runner import PlanEvent
from trsp_core.runs.store import Run, Store
from trsp_core.schema.events import DOMAINS
from trsp_core.schema.run_state import RunState

NEWS = {"found": "already there", "begun": "running", "going": "", "left out": "left out: what it needs has failed"}


@command("sweep")
@click.option("--grid", type=grids.read, required=True, metavar="FILE", help="a JSON file: base, axes, arms")
@click.option("--scheduler", metavar="ADDRESS", help="of a Dask scheduler whose workers share the folder of runs")
@click.option("--out", metavar="FILE", help="also write the record here, as JSON")
def main(grid: Grid, scheduler: str | None, out: str | None, as_json: bool) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    store = Store()
    total = len(grid.plan.variations)
    files = [grid_results.local(store.root) / f"{grid.plan.name}.json"]
    files += [paths.writable(out, makes_folders=True)] if out else []
    with executors.DaskExecutor(scheduler) if scheduler else executors.LocalExecutor() as workers:
        finished, bad = _work(grid, store, workers, files)
    output.tell(f"{len(finished)} of {total} points are done" + (f", {bad} did not finish." if bad else "."))
    if finished:
        record = _write(grid, finished, files)
        text = grid_results.to_json(record)
        output.show(escaping.written_json(text) if as_json else formatting.table(grid_results.cells(record)))
    return 3 if bad else 0


def _work(
    grid: Grid, store: Store, workers: executors.Executor, files: Sequence[Path]
) -> tuple[dict[str, tuple[Run, RunState]], int]:
    """Finished runs and their states by variation, and how many points did not finish."""
    total, line = len(grid.plan.variations), output.ProgressLine()
    finished: dict[str, tuple[Run, RunState]] = {}
    bad = 0
    for news in runner.work(grid.plan, store, workers):
        line.tell(_point(news, total), passing=news.kind == "going")
        bad += news.kind in runner.BAD
        if news.kind in ("found", "finished") and news.run and news.state:
            finished[news.variation.name] = (news.run, news.state)
            if news.kind == "finished" or len(finished) == total:
                _write(grid, finished, files)
    return finished, bad


def _write(grid: Grid, finished: dict[str, tuple[Run, RunState]], files: Sequence[Path]) -> grid_results.Sweep:
    record = grid_results.gather(grid, finished)
    for file in files:
        grid_results.write(record, file)
    return record


def _point(news: PlanEvent, total: int) -> str:
    """A point of a grid in one line: `[ 3/24] TRSP, steps 60: finished, perplexity 61.2 and 74.6; about 9:30 left`."""
    line = f"[{news.number:>{len(str(total))}}/{total}] {news.variation.title}: {NEWS.get(news.kind, news.kind)}"
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
