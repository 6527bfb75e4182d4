"""`sweep`: run what is missing of a grid; after each point its record is written anew. `--results` runs nothing."""

import signal

import click

from trsp_core import escaping, formatting, paths
from trsp_core.cli import output, plan_progress
from trsp_core.cli.command import command
from trsp_core.experiments import executors, grid_results, grids, plans, studies
from trsp_core.experiments.grid_results import Sweep
from trsp_core.experiments.grids import Grid
from trsp_core.experiments.plans import Ends
from trsp_core.runs.store import Store


@command("sweep")
@click.option("--grid", type=grids.read, required=True, metavar="FILE", help="a JSON file: base, axes, arms")
@click.option("--scheduler", metavar="ADDRESS", help="of a Dask scheduler whose workers share the folder of runs")
@click.option("--out", metavar="FILE", help="also write the record here, as JSON")
@click.option("--results", is_flag=True, help="run nothing: print, and write, what has finished")
def main(grid: Grid, scheduler: str | None, out: str | None, results: bool, as_json: bool) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    store = Store()
    total = len(grid.plan.variations)
    files = [grid_results.local(store.root) / f"{grid.plan.name}.json"]
    files += [paths.writable(out, makes_folders=True)] if out else []

    def write(ends: Ends) -> None:
        for file in files:
            grid_results.write(grid_results.gather(grid, ends), file)

    if results:
        ends = plans.ends(grid.plan, store.runs())
    else:
        with executors.DaskExecutor(scheduler) if scheduler else executors.LocalExecutor() as workers:
            ends = plan_progress.work(grid.plan, store, workers, write)
    bad = total - len(ends)
    missing = "are not" if results else "did not finish"
    output.tell(f"{len(ends)} of {total} points are done" + (f", {bad} {missing}." if bad else "."))
    if ends:
        write(ends)
        record = grid_results.gather(grid, ends)
        output.show(escaping.written_json(grid_results.to_json(record)) if as_json else _tables(record))
    return 3 if bad and not results else 0


def _tables(record: Sweep) -> str:
    """Every point; and of a study the means over splits, and how far the choices depend on the split."""
    tables, study = [grid_results.cells(record)], studies.read(record)
    if study:
        tables += [studies.cells(study), studies.spread_cells(study)]
    return "\n\n".join(formatting.table(cells) for cells in tables if len(cells) > 1)
