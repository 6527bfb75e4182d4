"""The wheel of a run that goes on: pause, one step, go on, and the knobs that can be turned meanwhile.

What is turned is a line in the run's folder. So a second tab, a link and the shell steer the same run, and each sees
what the others turned once the run has taken it.
"""

from __future__ import annotations

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.style import words
from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.runs import steering
from trsp_core.runs.store import Run
from trsp_core.schema import turns
from trsp_core.schema.config import KNOBS, RunConfig, layers_to_remove
from trsp_core.schema.run_state import RunState
from trsp_core.schema.turns import Turn

TIPS = {
    turns.PAUSE: "Stand still after the step at hand. Nothing is lost, and nothing of the result changes.",
    turns.GO: "Go on with the next step.",
    turns.STEP: "Take one step, then stand still.",
    turns.END_STAGE: "End the stage at hand after this step. In stage 1 the layers still to come are chosen at once.",
}
ERROR = "steer_error"


def wheel(run: Run, config: RunConfig, state: RunState) -> None:
    """Buttons and knobs of a run that goes on; the knobs that would do nothing are left out."""
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", key="wheel"):
        if state.paused:
            _button(run, turns.GO, "Go on", "play_arrow", kind="primary")
        else:
            _button(run, turns.PAUSE, "Pause", "pause")
        _button(run, turns.STEP, "One step", "skip_next")
        _button(run, turns.END_STAGE, "End this stage", "last_page", off=not _stage(state))
        with st.popover("Knobs", icon=":material/tune:", key="knobs"):
            _knobs(run, config, state)
        st.markdown(_standing(run, state))
    if refusal := session.get(ERROR):
        session.put(ERROR, "")
        st.error(refusal, icon=":material/block:")


def _standing(run: Run, state: RunState) -> str:
    """Whether it stands still, and what was asked for and not taken yet."""
    steps = {1: len(state.weight_steps), 2: len(state.gap_steps)}
    stage = _stage(state)
    where = f" after step {steps[stage]} of stage {stage}" if stage else ""
    paused = f":orange-badge[:material/pause: Paused{where}]" if state.paused else ""
    waiting = ":gray[:small[asked for, taken at the next step]]" if steering.is_waiting(run) else ""
    return f"{paused} {waiting}".strip() or f":gray[:small[{_last(state)}]]"


def _last(state: RunState) -> str:
    """What was turned last."""
    return words.plain(turns.sentence(state.turns[-1])) if state.turns else ""


def _stage(state: RunState) -> int:
    """The stage that could be ended: 1, 2, or 0 where none has taken a step."""
    if state.phase == "choose" and state.weight_steps:
        return 1
    return 2 if state.phase == "transfer" and state.gap_steps else 0


def _button(run: Run, name: str, label: str, icon: str, kind: str = "secondary", off: bool = False) -> None:
    st.button(
        label,
        icon=f":material/{icon}:",
        key=f"steer-{name}",
        help=TIPS[name],
        type="primary" if kind == "primary" else "secondary",
        disabled=off,
        on_click=_ask,
        args=(run, Turn(name)),
    )


def _knobs(run: Run, config: RunConfig, state: RunState) -> None:
    """A field for each knob that does something now; a new value is asked for as soon as it is entered."""
    now = turns.applied(config, turns.values(state.turns))
    names = [name for name in turns.STAGE_OF if not steering.useless(name, config, state)]
    names = [name for name in names if name != "ratio" or state.model]
    if not names:
        st.caption("There is no knob any more that would change something in this run.")
        return
    st.caption("A knob is taken at the next step. Then this is a steered run: no plan and no evidence counts it.")
    stages = sorted({turns.STAGE_OF[name] for name in names})
    for column, stage in zip(st.columns(len(stages)), stages, strict=True):
        with column:
            st.markdown(f"**Stage {stage}**")
            for name in names:
                if turns.STAGE_OF[name] == stage:
                    _field(run, name, now, state)


def _field(run: Run, name: str, now: RunConfig, state: RunState) -> None:
    """The field of one knob."""
    depth, knob = state.model.n_layers if state.model else 0, KNOBS[name]
    count = sum(turn.name == name for turn in state.turns)
    key = f"knob-{run.id}-{name}-{count}"  # a new field once it was turned, by whomever
    how = {"key": key, "on_change": _turn, "args": (run, name, key, depth)}
    if name == "ratio":
        st.number_input("Layers to remove", 1, depth - 1, layers_to_remove(now.ratio, depth), 1, **how)
        return
    low, high, value = knob.kind(knob.low or 0), knob.kind(knob.high or 0), getattr(now, name)
    if knob.kind is int:
        st.number_input(knob.label, low, high, max(value, low), 1, help=knob.help, **how)
    else:
        step = value / 10 or high / 1000
        st.number_input(knob.label, low, high, value, step, format=formatting.C_SETTING, help=knob.help, **how)


def _turn(run: Run, name: str, key: str, n_layers: int) -> None:
    """A callback: ask for the value that was entered."""
    value = session.get(key)
    if value is None:
        return
    _ask(run, Turn(name, value / n_layers if name == "ratio" else session.whole(value)))


def _ask(run: Run, turn: Turn) -> None:
    """A callback: ask for one turn, within the limits of this server; a refusal is shown once."""
    try:
        steering.ask(run, [turn], bounds=server.run_queue().limits)
    except TrspError as error:
        problems = error.problems or [error]
        text = " ".join(f"{problem.message} {problem.remedy}" for problem in problems)
        session.put(ERROR, words.plain(text))
