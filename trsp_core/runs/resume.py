"""Where a run that broke off can go on: read from its events, and from the head of the file that stage 2 left.

Nothing recorded is rewritten. `reopen` appends `Resumed`, which has the number of an event: the events from there on do
not count any more, and the run tells them again. That event begins the phase that broke off, or comes right after the
last round of stage 1, or after the last layer of a repair that a file still holds, or, from stage 2 on, after the last
step whose weights a file still holds. It never comes after an event that cannot be read. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from trsp_core.schema import events, turns
from trsp_core.runs import recorder
from trsp_core.schema.config import RunConfig
from trsp_core.errors import TrspError
from trsp_core.training.progress import ROUND, STEP, Past
from trsp_core.schema.schedules import ends
from trsp_core.schema.run_state import Line, RunState
from trsp_core.runs.store import Run


def find(run: Run, state: RunState | None = None, anew: bool = False) -> Past:
    """Where `run` goes on, and what stands before that.

    Args:
        state: of the run, where the caller has it already.
        anew: go by the files that are there now, also where an earlier `reopen` has settled it.

    Raises:
        TrspError: its config cannot be read.
    """
    state = run.state() if state is None else state
    if not state.count:
        return Past()
    history = [event for _, _, event in state.lines if isinstance(event, events.KnobTurned)]
    config = turns.applied(run.config(), turns.values(history))
    step, round_ = saved_step(run.checkpoint_file), saved_round(run.rounds_file)
    lines = list(itertools.takewhile(lambda line: not isinstance(line[2], events.EventsMissing), state.lines))
    next_event = state.reopened
    if anew or next_event is None:
        next_event = _next_event(config, lines, step, round_, len(run.solution_files))
    earlier = [line for line in lines if line[0] < next_event]
    restart_step = step if step and _behind(earlier, step) is not None else 0
    round_counts = bool(earlier) and _behind_round(earlier, round_) == earlier[-1][0] + 1
    refits = sum(isinstance(event, events.LayerRefitted) for _, _, event in earlier)
    in_repair = bool(earlier) and isinstance(earlier[-1][2], events.LayerRefitted)
    return Past(
        next_event,
        frozenset(name for _, name in _phases(earlier) if not (in_repair and name == "repair")),
        tuple(e.layers for _, _, e in earlier if isinstance(e, events.LayersChosen)),
        any(isinstance(e, events.LayersRemoved) for _, _, e in earlier),
        restart_step,
        run.checkpoint_file if restart_step else None,
        round_ if round_counts else 0,
        run.rounds_file if round_counts else None,
        next((e.weights for _, _, e in reversed(earlier) if isinstance(e, events.StageOneStepped)), []),
        refits if in_repair else 0,
    )


def outlook(run: Run, state: RunState | None = None) -> str:
    """Where `run` would go on, and what of it would be computed again: a sentence.

    Args:
        state: of the run, where the caller has it already.

    Raises:
        TrspError: its config cannot be read.
    """
    state = run.state() if state is None else state
    past = find(run, state)
    again = [event for n, _, event in state.lines if n >= past.next_event]
    if past.step:
        where = f"behind step {past.step} of stage 2"
    elif past.round:
        where = f"behind round {past.round} of stage 1"
    elif past.refits:
        where = f"behind {past.refits} layer{'s' if past.refits > 1 else ''} of the repair"
    else:
        first = again[0].name if again and isinstance(again[0], events.PhaseStarted) else ""
        phase = {"choose": "the choice of layers", "repair": "the repair", "transfer": "stage 2"}.get(first, "the phase that broke off")
        where = f"at the beginning of {phase if past.next_event else 'the run'}"
    counts = {
        "steps of stage 1": sum(isinstance(e, events.StageOneStepped) for e in again),
        "chosen layers": sum(isinstance(e, events.LayerChosen) for e in again),
        "layers of the repair": sum(isinstance(e, events.LayerRefitted) for e in again),
        "steps of stage 2": sum(isinstance(e, events.StageTwoStepped) for e in again),
        "measurements": sum(isinstance(e, _MEASUREMENTS) for e in again),
    }
    parts = [f"{count} {what if count > 1 else what.replace('s of', ' of').removesuffix('s')}"
             for what, count in counts.items() if count]  # fmt: skip
    return f"It goes on {where}" + (f"; computed again: {', '.join(parts)}." if parts else ".")


def reopen(run: Run, anew: bool = False) -> Past:
    """Let a run that was stopped, lost or failed go on: from here on it has not ended. Whoever starts it next finds
    where it goes on.

    Args:
        anew: as in `find`.

    Raises:
        TrspError: it has finished, a process is at it, its config cannot be read, or its folder cannot be written.
    """
    try:
        with run.hold():
            if run.state().ended == "finished":
                run.tidy()
                raise TrspError(f"Run {run.id} has finished: there is nothing left.", "Run it again for a new one.")
            past = find(run, anew=anew)
            run.tidy()
            for stale in ("cancel", "exit.json", "summary.json"):
                (run.folder / stale).unlink(missing_ok=True)
            recorder.add(run, events.Resumed(past.next_event))
    except OSError as error:
        raise TrspError(
            f"The folder of run {run.id} cannot be written: {error.strerror}.",
            "Free some space, or give this program the right to write there, then resume again.",
        ) from error
    return past


def take_up(run: Run) -> bool:
    """`reopen` a run that was stopped or lost. False where it failed, or cannot go on: then it is to be begun anew."""
    if run.status() not in ("cancelled", "lost", "damaged"):
        return False
    try:
        reopen(run)
    except TrspError:
        return False
    return True


def can(state: RunState, status: str) -> bool:
    """Whether a run with this state and status can be resumed."""
    return status in ("cancelled", "failed", "lost", "damaged") and state.ended != "finished"


def saved_step(file: Path) -> int:
    """Steps of stage 2 after which `file` was written; 0 where it is not there, or is no such file."""
    return _saved(file, STEP)


def saved_round(file: Path) -> int:
    """Rounds of stage 1 after which `file` was written; 0 where it is not there, or is no such file."""
    return _saved(file, ROUND)


def _saved(file: Path, what: str) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            return max(int((opened.metadata() or {}).get(what, 0)), 0)
    except (OSError, SafetensorError, ValueError):
        return 0


_MEASUREMENTS = (events.PerplexityMeasured, events.DivergenceMeasured, events.ImportanceMeasured, events.SpeedMeasured)


def _next_event(config: RunConfig, lines: Sequence[Line], step: int, round_: int, solutions: int) -> int:
    """The number of the first event that the run tells again; `step` and `round_` are what the files hold, 0 for none,
    and `solutions` is how many files a repair has left."""
    phases = _phases(lines)
    if not phases or phases[-1][1] in ("load", "text"):
        return 0
    (next_event, name), before = phases[-1], [phase for _, phase in phases[:-1]]
    behind = _behind(lines, step) if step else None
    step = step if behind is not None else 0
    cycle = before.count("transfer")
    needed_step = ends(config.stage2_steps, config.cycles)[min(cycle, config.cycles)] if config.stage2_steps else 0
    if step != needed_step and not (name == "transfer" and step > needed_step):
        # the weights of this phase are gone: back to those that a file holds, or to the model's own
        if behind is not None:
            return behind
        first = "choose" if config.learn_weights else "transfer"
        return next(n for n, phase in phases if phase == first)
    if step > needed_step and behind is not None:
        return behind
    if config.learn_weights and name != "choose" and before.count("choose") > cycle:  # the choice has moved W
        return [n for n, phase in phases if phase == "choose"][-1]
    if name == "choose":
        return max(next_event, _behind_round(lines, round_) or 0)
    if name == "repair":
        refits = [n for n, _, event in lines if isinstance(event, events.LayerRefitted)][:solutions]
        return max(next_event, *(n + 1 for n in refits[-1:]), 0)
    return next_event


def _phases(lines: Sequence[Line]) -> list[tuple[int, str]]:
    return [(n, e.name) for n, _, e in lines if isinstance(e, events.PhaseStarted)]


def _behind(lines: Sequence[Line], step: int) -> int | None:
    """The number of the event after those of this step of stage 2; None where there are none."""
    at = next((i for i, (_, _, e) in enumerate(lines) if isinstance(e, events.StageTwoStepped) and e.step == step), None)
    if at is None:
        return None
    behind = (events.DeletionProbed, events.KnobTurned)
    probes = itertools.takewhile(lambda line: isinstance(line[2], behind), lines[at + 1 :])
    return [lines[at], *probes][-1][0] + 1


def _behind_round(lines: Sequence[Line], round_: int) -> int | None:
    """The number of the event after the last choice in this round of stage 1; None where there is none."""
    if not round_:
        return None
    return max((n + 1 for n, _, e in lines if isinstance(e, events.LayerChosen) and e.round == round_), default=None)
