"""`compare`: run what is missing of a plan, one run after the other, each in a process of its own; then one table."""

import signal
from pathlib import Path

import click

from trsp_core import escaping, formatting, paths
from trsp_core.cli import output, plan_progress
from trsp_core.cli.command import command
from trsp_core.experiments import executors, plan_results, plans
from trsp_core.experiments.plans import Plan
from trsp_core.files import write_atomic
from trsp_core.preparation import preflight
from trsp_core.runs.store import Store

PLAN = f"a JSON file, or a built-in plan: {', '.join(plans.built_in())}"


@command("compare")
@click.option("--plan", type=plans.read, required=True, metavar="FILE", help=PLAN)
@click.option("--out", type=paths.writable, metavar="FILE", help="also write the record here, as JSON")
def main(plan: Plan, out: Path | None, as_json: bool) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    store = Store()
    if not plans.ends(plan, store.runs()):  # what cannot be begun is refused before there is a folder
        preflight.preflight(plans.config_of(plan, plan.variations[0], {}))
    with executors.LocalExecutor() as workers:
        ends = plan_progress.work(plan, store, workers)
    bad = len(plan.variations) - len(ends)
    if bad:
        output.tell(f"{bad} of {len(plan.variations)} runs did not finish.")
    if ends:
        record = plan_results.gather(plan, ends)
        text = plan_results.to_json(record)
        if out:
            write_atomic(out, text)
        output.show(escaping.written_json(text) if as_json else formatting.table(plan_results.cells(record)))
    return 3 if bad else 0
