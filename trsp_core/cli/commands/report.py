"""`report`: a run as one HTML file."""

from pathlib import Path

from trsp_core.cli import output
from trsp_core.cli.command import command, out_file
from trsp_core.cli.run_figures import run_argument
from trsp_core.export import html_report
from trsp_core.runs.store import Run


@command("report")
@run_argument
@out_file
def main(run: Run, out: Path, as_json: bool) -> None:
    output.write_file(out, html_report.html(run), as_json)
