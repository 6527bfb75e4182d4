"""`show`: the figures of one run, its command, and how it could go on."""

from trsp_core.cli import output, run_figures
from trsp_core.cli.command import command
from trsp_core.runs import resume
from trsp_core.runs.store import Run
from trsp_core.schema import turns


@command("show")
@run_figures.run_argument
def main(run: Run, as_json: bool) -> None:
    figures, state = run_figures.figures(run), run.state()
    text = f"{run_figures.account(figures)}\n{turns.command(run.config(), state.turns)}"
    if resume.can(state, figures["status"]):
        text += f"\npython -m trsp_core resume {run.id}: {resume.outlook(run, state)}"
    output.show_either(figures | {"config": run.config().as_dict()}, text, as_json)
