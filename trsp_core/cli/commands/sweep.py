"""`sweep`: run what is missing of a grid; after each point its record is written anew."""

import signal

import click

from trsp_core import escaping, formatting, paths
from trsp_core.cli import output, plan_progress
from trsp_core.cli.command import command
from trsp_core.experiments import executors, grid_results, grids
from trsp_core.experiments.grids import Grid
from trsp_core.experiments.plans import Ends
from trsp_core.runs.store import Store


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

    def write(ends: Ends) -> None:
        for file in files:
            grid_results.write(grid_results.gather(grid, ends), file)

    with executors.DaskExecutor(scheduler) if scheduler else executors.LocalExecutor() as workers:
        ends = plan_progress.work(grid.plan, store, workers, write)
    bad = total - len(ends)
    output.tell(f"{len(ends)} of {total} points are done" + (f", {bad} did not finish." if bad else "."))
    if ends:
        write(ends)
        record = grid_results.gather(grid, ends)
        text = grid_results.to_json(record)
        output.show(escaping.written_json(text) if as_json else formatting.table(grid_results.cells(record)))
    return 3 if bad else 0
