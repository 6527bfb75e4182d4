"""`list`: the runs, newest first."""

from typing import Any

from trsp_core import formatting, paths
from trsp_core.cli import output, run_figures
from trsp_core.cli.command import command
from trsp_core.runs.store import Store


@command("list")
def main(as_json: bool) -> None:
    runs = [run_figures.figures(run) for run in Store().runs()]
    hint = f"No runs in {paths.runs_root()} yet. Start one: python -m trsp_core run --preset quick"
    output.show_either(runs, formatting.table(list(map(_cells, runs))) or hint, as_json)


def _cells(figures: dict[str, Any]) -> list[str]:
    perplexity = figures["perplexity"].get("calibration", {})
    count = f"{len(figures['removed'])} of {figures['n_layers']}" if figures["removed"] else ""
    count = "all narrower" if figures.get("narrowed") else count
    by_state = ", ".join(f"{state} {formatting.perplexity(value)}" for state, value in perplexity.items())
    status = formatting.status(figures["status"]) + (", steered" if figures.get("turns") else "")
    return [figures["run"], status, figures["model"] or "", count, by_state]
