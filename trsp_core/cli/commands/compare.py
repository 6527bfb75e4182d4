"""`compare`: run what is missing of a plan, one run after the other, each in a process of its own; then one table."""

import time
from pathlib import Path

import click

from trsp_core import escaping, formatting, paths
from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.experiments import plan_results, plans
from trsp_core.experiments.plans import Plan, Variation
from trsp_core.files import write_atomic
from trsp_core.preparation import preflight
from trsp_core.runs import process, resume, worker
from trsp_core.runs.store import Run, Store
from trsp_core.schema.run_state import RunState

PLAN = "a JSON file, or a built-in plan: ablation, methods"


@command("compare")
@click.option("--plan", type=plans.read, required=True, metavar="FILE", help=PLAN)
@click.option("--out", type=paths.writable, metavar="FILE", help="also write the record here, as JSON")
def main(plan: Plan, out: Path | None, as_json: bool) -> int:
    store = Store()
    states: dict[str, RunState] = {}
    for number, variation in enumerate(plan.variations, 1):
        run = _finish(plan, variation, states, store, f"[{number}/{len(plan.variations)}] {variation.title}")
        state = states[variation.name] = run.state()
        if run.status() != "finished":
            failure = state.failure
            output.tell(*([failure.message, failure.remedy] if failure else [f"Run {run.id} did not finish."]))
            return worker.CODES.get(run.status(), 3)
    record = plan_results.gather(plan.name, store.runs(), plan)
    text = plan_results.to_json(record)
    if out:
        write_atomic(out, text)
    output.show(escaping.written_json(text) if as_json else formatting.table(plan_results.cells(record)))
    return 0


def _finish(plan: Plan, variation: Variation, states: dict[str, RunState], store: Store, title: str) -> Run:
    """The run of a variation, which goes on or begins where none has finished.

    Args:
        states: of the runs before it, by the variation's name.
    """
    config = plans.config_of(plan, variation, states)
    run = plans.find(store, plan, variation, config)
    while run and run.held():  # another shell is at it
        time.sleep(0.5)
    is_there = run is not None and run.status() == "finished"
    output.tell(f"{title}: {'already there' if is_there else 'running'}")
    if run and is_there:
        return run
    preflight.preflight(config)
    if run is None or not resume.take_up(run):
        if run:
            store.delete(run.id)
        run = plans.create(store, plan, variation, config)
    process.finish(run)
    return run
