"""`show`: the figures of one run, its command, and how it could go on."""

from trsp_core.cli import output, run_figures
from trsp_core.cli.command import command
from trsp_core.runs import resume
from trsp_core.runs.store import Run


@command("show")
@run_figures.run_argument
def main(run: Run, as_json: bool) -> None:
    figures = run_figures.figures(run)
    text = f"{run_figures.account(figures)}\n{run.config().as_command()}"
    if resume.can(run.state(), figures["status"]):
        text += f"\npython -m trsp_core resume {run.id}: {resume.outlook(run)}"
    output.show_either(figures | {"config": run.config().as_dict()}, text, as_json)
