"""The replay of a recorded run: play, pause, speed, and any moment of it, drawn by what draws a live run."""

from __future__ import annotations

from pathlib import Path
from time import monotonic as clock

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.charts import drawing, overview
from pages.ui.run import run_status, stages
from pages.ui.style import words
from pages.ui.style.theme import mode
from trsp_core import formatting
from trsp_core.charts import frames
from trsp_core.errors import TrspError
from trsp_core.pruning import methods
from trsp_core.runs import replay
from trsp_core.runs.replay import Playhead, Timeline
from trsp_core.runs.store import Run
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState

TICK = 0.5  # seconds between two frames
STEP = 0.5  # seconds a press of an arrow key moves
SPEEDS = {0.5: "½×", 1.0: "1×", 2.0: "2×", 4.0: "4×"}
KEY, SLIDER, SPEED = "player", "player-moment", "player-speed"
STILL = (  # room for the longest sentence, so that nothing below moves
    ".st-key-player-sentence {min-height:2.6rem;justify-content:flex-end} .st-key-home-title h2 {font-size:1.9rem}"
    "@media (max-width:640px) {.st-key-player-sentence {min-height:5.6rem} "
    ".st-key-player-sentence h4 {font-size:1.15rem} .st-key-winner {min-height:5rem} "
    ".st-key-home-title h2 {font-size:1.6rem;padding:0}}"
)


@st.cache_resource(show_spinner=False, max_entries=8)
def _timeline(folder: str, size: int) -> Timeline:
    return replay.timeline(Run(Path(folder)))


def run_to_replay() -> tuple[Run, RunConfig]:
    """The run that the address asks for, with its config; the one that ships with the app where it asks for none."""
    if run_id := session.replay_id():
        try:
            run = server.get_run(run_id)
            config = run.config()
        except TrspError as error:
            message = f"{words.plain(error.message)} It may have been deleted. Here is the run that comes with the app."
            st.warning(message, icon=":material/link_off:")
        else:
            if run.read()[0]:
                return run, config
            st.info(
                "That run has told nothing yet that could be replayed. Here is the run that comes with the app.",
                icon=":material/info:",
            )
    run = Run(replay.FOLDER)
    return run, run.config()


def area(run: Run, config: RunConfig) -> None:
    """The replay of `run`, from its start on for a tab that has not seen it; each tab has a head of its own."""
    timeline = _timeline(str(run.folder), run.events_file.stat().st_size)
    if session.get(KEY) is None or session.get(KEY)[0] != run.id:
        _put(run.id, Playhead(timeline.seconds))
    head = session.get(KEY)[1]
    st.html(f"<style>{STILL}</style>")
    st.fragment(_draw, run_every=TICK if head.playing else None)(
        run.id, config, timeline, _source(config, timeline), head.playing
    )


def _source(config: RunConfig, timeline: Timeline) -> str:
    """Which run this is."""
    end = timeline.state(timeline.seconds)
    name = run_status.name_of(config, end.model.n_layers if end.model else None)
    few, whole = frames.compared(end, config)
    return (
        f"{words.plain(name)}: a real run, recorded in {formatting.duration(end.at)} and told in "
        f"{formatting.duration(timeline.seconds)}. Its curves show multiples of the dense model's perplexity on "
        f"{frames.sample(end, config)}" + ("; sentence and figures, perplexity on all of them." if few < whole else ".")
    )


def _put(run_id: str, head: Playhead) -> None:
    session.put(KEY, (run_id, head))


def _draw(run_id: str, config: RunConfig, tape: Timeline, source: str, was_playing: bool) -> None:
    """One frame. Every part has its area from the first one on."""
    head = session.get(KEY)[1].look(clock())
    _put(run_id, head)
    if head.playing != was_playing:
        st.rerun()
    state = tape.state(head.at)
    with st.container(key="player-sentence"):
        st.markdown(f"#### {sentence(state)}")
    drawing.show(overview.spec(mode()), overview.frame(state, config), "figure", overview.ALT)
    _controls(run_id, head)
    st.caption(source)
    run_status.figures(state, config, live=not state.ended)
    if not methods.get(config.method).narrow:
        stages.stage_1(state, config)
    if state.refits or stages.climbs(config):
        stages.repair(state, config)
    if config.stage2_steps:
        stages.stage_2(state, config)
    stages.samples(state, config, reserve=True)


def _controls(run_id: str, head: Playhead) -> None:
    """Play or pause, start again, the moment, the speed."""

    def change(how: str) -> None:
        _put(run_id, getattr(session.get(KEY)[1], how)())

    def seek() -> None:
        _put(run_id, session.get(KEY)[1].seek(session.get(SLIDER)))

    def change_speed() -> None:
        _put(run_id, session.get(KEY)[1].at_speed(session.get(SPEED) or 1.0))

    session.put(SLIDER, head.position)
    with st.container(horizontal=True, vertical_alignment="center", key="player"):
        how, icon = ("pause", "pause") if head.playing else ("play", "play_arrow")
        label = "Pause" if head.playing else "Play" if head.at < head.end else "Play again"
        st.button(label, icon=f":material/{icon}:", key="player-play", on_click=change, args=(how,), width=130)
        st.button("From the start", icon=":material/replay:", key="player-restart", on_click=change, args=("restart",))
        st.slider(
            "Moment of the replay, seconds",
            0.0,
            max(head.end, STEP),
            step=STEP,
            format=f"{formatting.C_WHOLE} s",
            key=SLIDER,
            on_change=seek,
            label_visibility="collapsed",
        )
        st.segmented_control(
            "Speed",
            list(SPEEDS),
            default=head.speed,
            format_func=SPEEDS.__getitem__,
            key=SPEED,
            on_change=change_speed,
            required=True,
            label_visibility="collapsed",
        )


def sentence(state: RunState) -> str:
    """What happens now: a sentence or two."""
    depth = state.model.n_layers if state.model else 0
    by = state.figures("calibration")
    count = len(state.chosen)
    if state.ended in ("failed", "cancelled"):
        return "This run ended here, before its time."
    if state.removed and "pruned" in by:
        before, after = (words.perplexity_or_wait(by, name, live=False) for name in ("dense", "pruned"))
        ending = f"Perplexity went from {before} to {after}"
        if "direct" in by:
            ending += f"; deleted at once, {formatting.perplexity(by['direct'])}"
        return f"{_gone(state)} {ending}."
    if state.removed:
        return f"{_gone(state)} How well does the rest predict?"
    if state.phase == "repair":
        return _repairing(state)
    if state.phase == "repaired":
        return "Stage 2. All layers that stay are repaired. How well do they predict, before any training?"
    if state.refits and (state.gap_steps or state.phase == "transfer"):
        return "Stage 2. The repaired layers go on learning together, step by step."
    if state.gap_steps:
        if any(state.gap_steps[-1].gaps):
            return "Stage 2. The chosen layers learn to change nothing, and the others to do without them."
        return "Stage 2. The chosen layers do nothing any more. The others go on learning to do without them."
    if state.phase == "transfer":
        return "Stage 2. All layers run again, and the knowledge is to move."
    if state.phase == "direct" and count:
        return f"What if these {count} layers were simply deleted? Perplexity tells: lower is better."
    if state.rounds and state.weight_steps:
        layer = state.rounds[-1].layer
        why = f"Of the layers left, {layer} has sunk furthest"
        if not frames.sank_furthest(state):
            why = f"Of those that have sunk furthest, {layer} is missed least"
        return f"Stage 1. {why}: crossed out as {frames.choice(state, layer)}."
    if state.rounds:
        layer = state.rounds[-1].layer
        return f"Stage 1. Layer {layer} is chosen as {frames.choice(state, layer)}: it is crossed out."
    if state.chosen:
        return f"Stage 1. Chosen: {words.layers(state.chosen)}."
    if overview.stage(state) == 1:
        return "Stage 1. Every layer gets a weight. All are pulled down; those that the text needs hold out."
    if depth:
        return f"A language model is a stack of layers. This one has {depth}: does it need them all?"
    return "A language model is a stack of layers. Does it need them all?"


def _repairing(state: RunState) -> str:
    """What a repair is, and where this one is."""
    now = frames.repairing(state)
    which = "" if now is None else f" Now layer {now}."
    return f"Stage 2. Each layer that stays is solved to hand on what the whole model had there.{which}"


def _gone(state: RunState) -> str:
    if state.narrowed or not state.removed:
        return "All layers are narrower."
    layers, before, after = state.removed.removed, state.removed.parameters_before, state.removed.parameters
    depth, less = len(layers) + len(state.removed.kept), words.share(before - after, before)
    return f"{len(layers)} of {depth} layers are gone, {less} of the parameters."
