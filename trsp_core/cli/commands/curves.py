"""`curves`: a run's curves as CSV."""

from pathlib import Path

from trsp_core.cli import output
from trsp_core.cli.command import command, out_file
from trsp_core.cli.run_figures import run_argument
from trsp_core.export import curves_csv
from trsp_core.runs.store import Run


@command("curves")
@run_argument
@out_file
def main(run: Run, out: Path, as_json: bool) -> None:
    output.write_file(out, curves_csv.table(run.config(), run.state()), as_json)
