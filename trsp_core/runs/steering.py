"""Steering a run while it goes on. Whoever looks at it writes a line to steer.jsonl in its folder (`ask`); its process
takes that between two steps (`steered`), and tells a `KnobTurned`. Both check it against the same bounds.

What is taken stands in the events, so a run that breaks off and is resumed takes it again at the same step. Lines that
name a step beforehand (`schedule`) repeat a steered run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from pathlib import Path

from trsp_core import formatting, paths
from trsp_core.errors import TrspError, refuse
from trsp_core.pruning import validate
from trsp_core.runs import limits
from trsp_core.runs.limits import Limits
from trsp_core.runs.store import Run
from trsp_core.schema import run_state, schedules, turns
from trsp_core.schema.config import RunConfig, layers_to_remove
from trsp_core.schema.events import (
    DeletionProbed,
    Event,
    KnobTurned,
    Noted,
    PhaseStarted,
    RunFinished,
    StageOneStepped,
    StageTwoStepped,
)
from trsp_core.schema.run_state import RunState
from trsp_core.schema.turns import Turn
from trsp_core.training.steering import Steering

LOOK_EVERY = 0.2  # seconds between two looks of a paused run
MOST_BYTES = 200_000  # of steer.jsonl: some thousand turns
MOST_REFUSALS = 5  # that a run notes
STEPS = (StageOneStepped, StageTwoStepped)
BOUNDARIES = (*STEPS, DeletionProbed, PhaseStarted)  # after these the next step takes what was turned
AFTER_STAGE_2 = ("trained", "importance after", "pruned", "speed", "save")
AFTER_STAGE_1 = ("direct", "repair", "repaired", "transfer", *AFTER_STAGE_2)


def ask(run: Run, wanted: Sequence[Turn], state: RunState | None = None, bounds: Limits | None = None) -> None:
    """Ask a running run to turn knobs at its next step.

    Args:
        state: of the run, where the caller has it already.
        bounds: those of this process where None is given.

    Raises:
        TrspError: it does not run, a knob does nothing there any more, a value is out of bounds, or the folder cannot be
            written.
    """
    state, bounds = state or run.state(), bounds or limits.current()
    if run.status(state.ended) != "running":
        raise TrspError(f"Run {run.id} is not running, so nothing of it can be turned.", "Resume it first, if it can be.")
    config = run.config()
    for turn in wanted:
        check(turn, config, state, bounds, run.folder.parent)
    _write(run, wanted)


def schedule(run: Run, wanted: Iterable[Turn]) -> None:
    """Let a run that has not begun turn knobs at the steps that `wanted` names.

    Raises:
        TrspError: its folder cannot be written.
    """
    _write(run, list(wanted))


def refuse_scheduled(config: RunConfig, wanted: Sequence[Turn]) -> None:
    """Raises TrspError: a knob in `wanted` does nothing in a run of `config`, or its value is out of bounds."""
    for turn in wanted:
        check(turn, config, RunState(), limits.current(), paths.runs_root())


def _write(run: Run, wanted: Sequence[Turn]) -> None:
    """All lines at once, so that no reader meets a part of one; a torn line before them is ended."""
    if not wanted:
        return
    file = run.folder / "steer.jsonl"
    lines = "".join(f"{turns.to_line(turn)}\n" for turn in wanted).encode()
    try:
        with file.open("ab+", buffering=0) as opened:
            size = opened.tell()
            opened.seek(max(size - 1, 0))
            torn = size and opened.read(1) != b"\n"
            if size + len(lines) >= MOST_BYTES:
                raise TrspError("This run has been turned too often.", "Let it go on as it is, or start a new one.")
            opened.write((b"\n" if torn else b"") + lines)
    except OSError as error:
        message = f"The folder of run {run.id} cannot be written: {error.strerror}."
        raise TrspError(message, "Free some space, or give this program the right to write there.") from error


def is_waiting(run: Run) -> bool:
    """Whether something was asked for after the run's last event."""
    try:
        return (run.folder / "steer.jsonl").stat().st_mtime_ns > run.events_file.stat().st_mtime_ns
    except OSError:
        return False


def check(turn: Turn, config: RunConfig, state: RunState, bounds: Limits, root: Path) -> None:
    """Raises TrspError: this turn would do nothing in a run of `config` that stands where `state` says, or is out of
    bounds. `root` is the folder of runs."""
    turns.check(turn)
    if turn.name in (turns.PAUSE, turns.GO, turns.STEP):
        return
    turn = plain(turn, state)
    if reason := useless(turn.name, config, state):
        raise TrspError(reason, "It is left as it is.")
    now = turns.applied(config, turns.values(state.turns))
    n_layers = state.model.n_layers if state.model else None
    if not turn.stage and (reason := _impossible(turn, now, state)):
        raise TrspError(reason, "It is left as it is.")
    wanted = turns.applied(now, {turn.name: turns.read(turn.name, turn.value)})
    refuse([*validate.check(wanted, n_layers), *bounds.check_run(wanted, root)])


def plain(turn: Turn, state: RunState) -> Turn:
    """`turn`, with the end of a stage as the turn of its steps that it is.

    Raises:
        TrspError: no stage is under way.
    """
    if turn.name != turns.END_STAGE:
        return turn
    if state.phase == "choose" and state.weight_steps:
        return Turn("stage1_steps", 0)
    if state.phase == "transfer" and state.gap_steps:
        return Turn("stage2_steps", state.gap_steps[-1].step)
    raise TrspError("No stage is under way that could be ended.", "Wait for the first step of one.")


def useless(name: str, config: RunConfig, state: RunState) -> str:
    """Why turning this knob does nothing in a run of `config`, or nothing any more: a sentence; "" where it does."""
    stage = turns.STAGE_OF[name]
    if name in ("ratio", "stage1_steps", "stage2_steps") and config.cycles > 1:
        return "With several cycles, layers and steps are shared out before the run begins."
    if stage == 1 and config.method != "trsp":
        return f"The method {config.method} learns no layer weights in rounds."
    if name == "ratio" and config.one_shot:
        return "All layers are chosen in one round, which this does not change."
    if name == "stage1_weight_lr" and not config.learn_weights:
        return "The model's weights do not learn in stage 1 of this run."
    if stage == 1:
        return "Stage 1 is not under way any more." if state.phase in AFTER_STAGE_1 else ""
    if not config.stage2_steps:
        return "Stage 2 has no steps in this run."
    if name == "lambda_2" and (config.deletes_first or not config.lambda_2):
        return "This run was begun without a penalty on the chosen layers."
    if name == ("stage2_lr" if config.adapter_rank else "adapter_lr"):
        return "This is not the rate at which stage 2 of this run learns."
    done = state.gap_steps[-1].step if state.gap_steps else 0
    steps = turns.applied(config, turns.values(state.turns)).stage2_steps
    if state.phase in AFTER_STAGE_2 or done >= steps > 0:
        return "Stage 2 has taken its last step."
    if name == "lambda_2" and state.phase == "transfer" and not schedules.penalty_acts(config, done + 1):
        return "The gate on the chosen layers is shut, so λ₂ does nothing any more."
    return ""


def _impossible(turn: Turn, now: RunConfig, state: RunState) -> str:
    """Why this turn cannot be taken where the run stands: a sentence, or ""."""
    done = state.gap_steps[-1].step if state.gap_steps else 0
    if turn.name == "stage2_steps" and turn.value < max(done, 1):
        return f"Stage 2 cannot end after {formatting.count(turn.value)} steps: it has taken {done}."
    if turn.name == "stage1_steps" and turn.value == 0 and not (state.phase == "choose" and state.weight_steps):
        return "Stage 1 has taken no step yet that its choice could go by."
    if turn.name == "ratio" and not state.model:
        return "The model is not loaded yet, so the number of its layers is not known."
    if turn.name == "ratio" and state.model:
        count = layers_to_remove(turn.value, state.model.n_layers)
        if count < max(len(state.chosen), 1):
            return f"{len(state.chosen)} layers are chosen already, more than the {count} asked for."
    return ""


def steered(
    run: Run,
    config: RunConfig,
    story: Callable[[Steering], Generator[Event, None, None]],
    bounds: Limits | None = None,
) -> Generator[Event, None, None]:
    """The events of a run that can be steered, and among them what was turned.

    Args:
        story: the run's events, by a `Steering` that says what its settings are now.
        bounds: those of this process where None is given.
    """
    helm = Helm(run, config, bounds or limits.current())
    with contextlib.closing(story(helm.steering)) as events:
        for event in events:
            if isinstance(event, RunFinished):
                yield from helm.unreached()
            yield event
            yield from helm.after(event)


class Helm:
    """What the process of a run knows of its steering. Between two events it turns the knobs of `steering`, and waits
    while the run is paused."""

    def __init__(self, run: Run, config: RunConfig, bounds: Limits):
        self._run, self._config, self._bounds = run, config, bounds
        self._file, self._offset, self._count = run.folder / "steer.jsonl", 0, 0  # bytes and lines that were read
        self._state = run.state()
        self.steering = Steering(turns.values(self._state.turns))
        self._stage, self._steps = 1, {1: 0, 2: 0}  # where the run stands: the stage, and the steps taken of each
        self._step_request, self._refusals = 0, 0
        for _, _, event in self._state.lines:
            self._stand(event)
        history = [event for _, _, event in run.read()[0] if isinstance(event, KnobTurned)]
        overtaken = dict.fromkeys(e for e in history if e.name in turns.STAGE_OF and e not in self._state.turns)
        self._due = [(e.request, Turn(e.name, e.after, e.stage, e.step)) for e in overtaken]
        self._inbox = self._unanswered({event.request for event in history})

    def after(self, event: Event) -> Generator[Event, None, None]:
        """What is turned between `event` and the next one."""
        self._stand(event)
        self._fold(event)
        boundary = isinstance(event, BOUNDARIES)
        self._inbox += self._new_lines()
        if self._inbox or (boundary and self._due):
            yield from self._serve(boundary)
        if self._step_request and isinstance(event, STEPS):
            request, self._step_request = self._step_request, 0
            yield self._turned(turns.PAUSE, 0, 1, request)
        if self._state.paused:
            yield from self._wait(boundary)

    def unreached(self) -> Generator[Event, None, None]:
        """A note on turns that named a step at which the run never stood."""
        if self._due:
            words = ", ".join(f"{turn.stage}:{turn.step}:{turn.name}" for _, turn in self._due[:MOST_REFUSALS])
            yield Noted(f"What was to be turned at a step that this run never came to was left out: {words}.")

    def _wait(self, boundary: bool) -> Generator[Event, None, None]:
        """Stand still until somebody lets the run go on, stops it, or its time to pause is over."""
        end = time.monotonic() + 60 * self._bounds.pause_minutes
        while self._state.paused:
            if self._run.cancelled() or not self._run.folder.exists():
                raise KeyboardInterrupt  # the recorder ends the run in writing
            if time.monotonic() > end:
                yield self._turned(turns.PAUSE, 1, 0, self._count)
                minutes = formatting.setting(self._bounds.pause_minutes)
                yield Noted(f"The run went on by itself: a pause of {minutes} minutes is possible here.")
                return
            time.sleep(LOOK_EVERY)
            self._inbox += self._new_lines()
            yield from self._serve(boundary)

    def _serve(self, boundary: bool) -> Generator[Event, None, None]:
        """Take what is due at this step and what was asked for; outside a `boundary` only to pause and to go on."""
        here = (self._stage, self._steps[self._stage])
        due = [(n, turn) for n, turn in self._due if boundary and (turn.stage, turn.step) == here]
        self._due = [pair for pair in self._due if pair not in due]
        for request, turn in due:
            yield from self._take(request, Turn(turn.name, turn.value))
        inbox, self._inbox = self._inbox, []
        for request, line in inbox:
            turn = _readable(line)
            if turn and turn.stage:
                self._due.append((request, turn))
            elif boundary or not turn or turn.name in (turns.PAUSE, turns.GO, turns.STEP):
                yield from self._take(request, turn)
            else:
                self._inbox.append((request, line))

    def _take(self, request: int, turn: Turn | None) -> Generator[Event, None, None]:
        """Turn one knob, or note why not; None stands for a line that is no turn."""
        if turn is None:
            yield from self._refuse("a line of steer.jsonl is no turn of a knob")
        elif turn.name in (turns.PAUSE, turns.GO, turns.STEP):
            self._step_request = request if turn.name == turns.STEP else 0
            if self._state.paused != (turn.name == turns.PAUSE):
                yield self._turned(turns.PAUSE, int(self._state.paused), int(not self._state.paused), request)
        else:
            try:
                check(turn, self._config, self._state, self._bounds, self._run.folder.parent)
                turn = plain(turn, self._state)
            except TrspError as error:
                yield from self._refuse(f"{turn.name}. {error.message}")
                return
            before = getattr(self.steering.now(self._config), turn.name)
            after = turns.read(turn.name, turn.value)
            if after != before:
                self.steering.turn(turn.name, after)
                yield self._turned(turn.name, before, after, request)

    def _turned(self, name: str, before: float, after: float, request: int) -> KnobTurned:
        """The event that tells it."""
        event = KnobTurned(self._stage, self._steps[self._stage], name, before, after, request)
        self._fold(event)
        return event

    def _refuse(self, reason: str) -> Generator[Event, None, None]:
        self._refusals += 1
        if self._refusals <= MOST_REFUSALS:
            last = " Further ones are not noted." if self._refusals == MOST_REFUSALS else ""
            yield Noted(f"A knob was not turned: {reason}{last}")

    def _stand(self, event: Event) -> None:
        """Note where the run stands after `event`."""
        if isinstance(event, PhaseStarted) and event.name in ("choose", "transfer"):
            self._stage = 1 if event.name == "choose" else 2
        elif isinstance(event, StageOneStepped):
            self._steps[1] = event.step
        elif isinstance(event, StageTwoStepped):
            self._steps[2] = event.step

    def _fold(self, event: Event) -> None:
        run_state.fold(self._state, [(self._state.count, self._state.at, event)])

    def _unanswered(self, answered: Collection[int]) -> list[tuple[int, bytes]]:
        """The lines that are in the file already and were not taken by a process before this one."""
        last = max(answered, default=0)
        lines = [(n, line) for n, line in self._new_lines() if n not in answered]
        return [(n, line) for n, line in lines if n > last or ((turn := _readable(line)) and turn.stage)]

    def _new_lines(self) -> list[tuple[int, bytes]]:
        """The lines since the last look, with their numbers from 1."""
        try:
            if os.stat(self._file).st_size <= self._offset:
                return []
            with self._file.open("rb") as file:
                file.seek(self._offset)
                content = file.read(MOST_BYTES - self._offset)
        except OSError:  # nobody has steered this run
            return []
        whole = content[: content.rfind(b"\n") + 1]
        lines = list(enumerate(whole.split(b"\n")[:-1], self._count + 1))
        self._offset, self._count = self._offset + len(whole), self._count + len(lines)
        return lines


def _readable(line: bytes) -> Turn | None:
    """The turn that a line asks for; None where it is none."""
    try:
        return turns.from_line(line)
    except TrspError:
        return None
