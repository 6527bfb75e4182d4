"""`steer`: turn the knobs of a run while it runs."""

import click

from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.cli.run_figures import run_argument
from trsp_core.errors import TrspError
from trsp_core.runs import steering
from trsp_core.runs.store import Run
from trsp_core.schema import turns
from trsp_core.schema.config import KNOBS
from trsp_core.schema.turns import Turn

FLAGS = {
    turns.PAUSE: "stand still after the step at hand",
    turns.STEP: "take one step, then stand still",
    turns.GO: "go on",
    turns.END_STAGE: "end the stage at hand; where that is stage 1, the layers still to come are chosen at once",
}


def _flag(name: str) -> click.Option:
    """The flag of a setting that can be turned: its value stays text here, and is read as `run` reads it."""
    knob = KNOBS[name]
    what = f"{knob.label} (stage {turns.STAGE_OF[name]}; {knob.bounds})"
    return click.Option([knob.flag], metavar=knob.kind.__name__.upper(), help=what)


@command("steer", params=[_flag(name) for name in turns.STAGE_OF])
@run_argument
@click.option("--pause", "deed", flag_value=turns.PAUSE, help=FLAGS[turns.PAUSE])
@click.option("--step", "deed", flag_value=turns.STEP, help=FLAGS[turns.STEP])
@click.option("--go", "deed", flag_value=turns.GO, help=FLAGS[turns.GO])
@click.option("--end-stage", is_flag=True, help=FLAGS[turns.END_STAGE])
def main(run: Run, deed: str | None, end_stage: bool, as_json: bool, **flags: str | None) -> None:
    wanted = [Turn(name, turns.read(name, value)) for name, value in flags.items() if value is not None]
    wanted += [Turn(turns.END_STAGE)] if end_stage else []
    wanted += [Turn(deed)] if deed else []  # last: a run that goes on has turned what stands before
    if not wanted:
        raise TrspError("Nothing is to be turned.", "Name a knob, for example --lambda-1 0.1, or --pause.")
    steering.ask(run, wanted)
    text = f"Run {run.id} takes it at its next step. Then it is a steered run: no plan counts it."
    if not any(turn.name in turns.STAGE_OF or turn.name == turns.END_STAGE for turn in wanted):
        text = f"Run {run.id} does so after the step at hand."
    output.show_either({"run": run.id, "turns": wanted}, text, as_json)
