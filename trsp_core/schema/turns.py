"""Knobs that may be turned while a run goes on: which they are, how a turn is written, and what settings it leads to.

A `Turn` is what a person asks for: a line of steer.jsonl in the run folder, or a word such as `1:7:lambda_1=0.1` behind
`--steer`. `events.KnobTurned` is what was taken. A stage is ended by a turn of its steps: those of stage 2 to as many
as it has taken, those of a round of stage 1 to 0, and then the layers still to come are chosen at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.schema import codec
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.schema.events import KnobTurned

STAGE_OF = {
    "lambda_1": 1, "stage1_lr": 1, "stage1_weight_lr": 1, "stage1_steps": 1, "ratio": 1,
    "lambda_2": 2, "stage2_lr": 2, "adapter_lr": 2, "stage2_steps": 2,
}  # fmt: skip
"""The settings that can be turned, and the stage in which each acts."""
PAUSE, GO, STEP, END_STAGE = "pause", "go", "step", "end_stage"
COMMANDS = (PAUSE, GO, STEP, END_STAGE)
SHORT = {"lambda_1": "λ₁", "lambda_2": "λ₂", "stage1_steps": "steps a round", "stage2_steps": "steps", "ratio": "share"}
MOST_LETTERS = 300  # of a line in steer.jsonl
_WORD = re.compile(r"([12]):(\d{1,7}):([a-z0-9_]{1,30})=(\S{1,40})")


@dataclass(frozen=True)
class Turn:
    """A knob to be turned.

    Attributes:
        name: of a setting in `STAGE_OF`, or one of `COMMANDS`, which have no value.
        stage, step: when: after this step of this stage. With stage 0 it is at the next step.
    """

    name: str
    value: float = 0.0
    stage: int = 0
    step: int = 0


def to_line(turn: Turn) -> str:
    """One line of steer.jsonl, without the newline."""
    return codec.encode(turn)


def from_line(line: bytes) -> Turn:
    """The turn that one line of steer.jsonl asks for.

    Raises:
        TrspError: it is none.
    """
    try:
        if len(line) > MOST_LETTERS:
            raise ValueError("too long")
        turn = codec.decode(line, Turn)
    except ValueError as error:  # UnicodeDecodeError is one
        raise TrspError("A line of steer.jsonl is no turn of a knob.", "It is left out.") from error
    check(turn)
    return turn


def from_word(word: str) -> Turn:
    """The turn that a word such as `1:7:lambda_1=0.1` asks for: stage, step, setting and value.

    Raises:
        TrspError: it is none.
    """
    match = _WORD.fullmatch(word)
    if not match or match[3] not in STAGE_OF:
        remedy = f"Write STAGE:STEP:SETTING=VALUE, for example 1:7:lambda_1=0.1; settings are {', '.join(STAGE_OF)}."
        raise TrspError(f"{word[:60]!r} is no turn of a knob.", remedy)
    turn = Turn(match[3], read(match[3], match[4]), int(match[1]), int(match[2]))
    check(turn)
    return turn


def check(turn: Turn) -> None:
    """Raises TrspError: there is no such knob, or its value is out of bounds."""
    if turn.name not in COMMANDS:
        read(turn.name, turn.value)
    if turn.stage not in (0, 1, 2) or not 0 <= turn.step < 10**7 or (turn.stage and turn.name in COMMANDS):
        raise TrspError("A turn of a knob stands at no step of a stage.", "It is left out.")


def read(name: str, value: Any) -> Any:
    """The value of a knob, of its type. Steps may be 0, which ends a stage.

    Raises:
        TrspError: there is no such knob that can be turned, or the value is out of bounds.
    """
    if name not in STAGE_OF:
        raise TrspError(
            f"{name[:40]!r} cannot be turned while a run goes on.", f"What can be: {', '.join((*STAGE_OF, *COMMANDS))}."
        )
    typed, problem = KNOBS[name].parse(value)
    if problem and not (name.endswith("_steps") and str(value) in ("0", "0.0")):
        raise TrspError(problem.message, problem.remedy)
    return 0 if problem else typed


def values(history: Iterable[KnobTurned]) -> dict[str, Any]:
    """What the knobs stand at that were turned, by name. What a damaged record says beyond their bounds is left out."""
    now = {}
    for turn in history:
        try:
            now[turn.name] = read(turn.name, turn.after)
        except TrspError:
            continue
    return now


def applied(config: RunConfig, now: Mapping[str, Any]) -> RunConfig:
    """`config` with `values` in place."""
    return dataclasses.replace(config, **now) if now else config


def course(config: RunConfig, history: Iterable[KnobTurned], name: str, steps: int) -> list[float]:
    """What the knob `name` stood at in each of the first `steps` steps of its stage."""
    course: list[float] = [getattr(config, name)] * steps
    for turn in history:
        if turn.name == name and turn.stage == STAGE_OF[name] and 0 <= turn.step < steps:
            course[turn.step :] = [turn.after] * (steps - turn.step)
    return course


def command(config: RunConfig, history: Sequence[KnobTurned]) -> str:
    """The shell command that repeats a run with all that was turned in it."""
    return " ".join([config.as_command(), *(f"--steer {word(turn)}" for turn in history)])


def word(turn: KnobTurned) -> str:
    """What `from_word` reads: `1:7:lambda_1=0.1`."""
    return f"{turn.stage}:{turn.step}:{turn.name}={turn.after}"


def label(turn: KnobTurned) -> str:
    """What a mark on a chart says: `λ₁ 0.1`."""
    if ends_stage(turn):
        return "ended"
    return f"{SHORT.get(turn.name, 'rate')} {formatting.setting(turn.after)}"


def ends_stage(turn: KnobTurned) -> bool:
    """Whether it ended the stage that it was taken in."""
    steps = turn.name == "stage2_steps" and turn.after == turn.step
    return turn.stage == STAGE_OF.get(turn.name) and (steps or (turn.name == "stage1_steps" and not turn.after))


def sentence(turn: KnobTurned) -> str:
    """`after step 7 of stage 1: λ₁ from 0.05 to 0.1`."""
    when = f"after step {turn.step} of stage {turn.stage}" if turn.step else f"before stage {turn.stage}"
    if ends_stage(turn):
        rest = ", and the layers still to come were chosen at once" if turn.stage == 1 else ""
        return f"{when}: the stage was ended{rest}"
    knob = KNOBS.get(turn.name)
    name = SHORT.get(turn.name) if turn.name.startswith("lambda") else knob.label.lower() if knob else turn.name
    return f"{when}: {name} from {formatting.setting(turn.before)} to {formatting.setting(turn.after)}"


def account(history: Sequence[KnobTurned], most: int = 12) -> str:
    """That a run was steered, and how; "" of one that was not."""
    if not history:
        return ""
    rest = f"; and {len(history) - most} more" if len(history) > most else ""
    how = "; ".join(map(sentence, history[:most])) + rest
    return f"Steered while it ran, so its figures are no evidence, and no plan counts it: {how}."
