"""The parts of a page that shows a run: where it stands, its charts, its texts."""

from __future__ import annotations

import contextlib

import streamlit as st

from pages.ui import charts, planner, series, server, session, words
from pages.ui.controls import title_of
from pages.ui.theme import STATUS_COLOURS, STATUS_ICONS, mode
from trsp_core import methods
from trsp_core.config import RunConfig
from trsp_core.errors import TrspError
from trsp_core.state import RunState
from trsp_core.store import Run


def title(run: Run, config: RunConfig, state: RunState, status: str) -> None:
    """Which run this is, and how it stands."""
    badge = f":{STATUS_COLOURS[status]}-badge[{STATUS_ICONS[status]} {words.STATUSES[status]}]"
    st.markdown(f"### {words.plain(name_of(config, depth_of(config, state)))} {badge}")
    st.caption(f"{when(run)} · calibrated on {words.plain(title_of(config.text))} · run {run.id}")


def name_of(config: RunConfig, depth: int | None) -> str:
    """`TRSP on SmolLM2 135M Instruct, 8 of 30 layers`."""
    known = methods.all_methods().get(config.method)
    what = f"{known.title if known else config.method} on {title_of(config.model)}"
    if not depth:
        return f"{what}, ratio {config.ratio:g}" if config.method != "manual" else what
    return f"{what}, {series.removals(config, depth)} of {depth} layers"


def depth_of(config: RunConfig, state: RunState) -> int | None:
    """L, from the run or else from the model's files."""
    if state.model:
        return state.model.n_layers
    found = server.facts(config.model)
    return None if isinstance(found, TrspError) else found.n_layers


def when(run: Run) -> str:
    try:
        return words.when(run.id, run.folder.stat().st_mtime)
    except OSError:
        return ""


def progress(run: Run, state: RunState, status: str) -> None:
    """The bar with the phase in words and the time left, and the strip of all phases."""
    if status == "queued":
        place = server.jobs().place(run.id)
        ahead = f"place {place} in the queue" if place > 1 else "next in the queue"
        st.progress(0.0, text=f"Waiting: {ahead}. It starts by itself; this page may be closed.")
        return
    left = state.seconds_left
    text = words.phase(state.phase) if state.phase else "Starting its process"
    if run.cancelled():
        text = "Stopping after the step at hand"
    elif left is not None:
        text += f" · about {words.duration(left)} left"
    st.progress(state.fraction, text=text)
    strip(state)


def strip(state: RunState) -> None:
    """All phases in order: done, now, to come."""
    names = [p["name"] for p in state.phases]
    now = names.index(state.phase) if state.phase in names else -1
    marks = []
    for i, name in enumerate(names):
        label = words.SHORT_PHASES.get(name, words.phase(name))
        if i < now or state.ended == "finished":
            marks.append(f":gray-badge[:material/check: {label}]")
        else:
            marks.append(f":blue-badge[**{label}**]" if i == now else f":gray[:small[· {label}]]")
    st.markdown(" ".join(marks) or ":gray[The plan follows in a moment]")


def figures(state: RunState, config: RunConfig) -> None:
    """The numbers of the moment."""
    by = {s: values.get("calibration") for s, values in state.perplexity.items()}
    total = series.planned_removals(state, config)
    with st.container(horizontal=True, key="figures"):
        st.metric("Layers chosen", f"{len(state.chosen)} of {total}" if total else "0")
        st.metric("Perplexity, dense", _shown(by, "dense"))
        st.metric("Layers deleted at once", _shown(by, "direct"))
        if "pruned" in by or not state.probes:
            st.metric("Pruned", _shown(by, "pruned"))
        else:
            probe = state.probes[-1]
            st.metric(f"If deleted now, on {probe.blocks} blocks", words.perplexity(probe.perplexity))
        st.metric("Time so far" if not state.ended else "Time", words.duration(state.at))


def _shown(by: dict[str, float | None], name: str) -> str:
    return words.perplexity(by[name]) if name in by else "–"


def stage_1(state: RunState, config: RunConfig) -> None:
    """How the layers are chosen."""
    trains = bool(state.weight_steps) or _learns(config)
    st.markdown("#### Stage 1: which layers matter least" if trains else "#### Choosing the layers")
    left, right = st.columns([2, 1], gap="medium")
    with left:
        if trains:
            st.caption("A line a layer: its weight sinks where the text needs it least. A dot: chosen in that round.")
            planned = series.planned_steps(state, config, 1)
            charts.show(charts.weights(mode()), series.weights(state, planned), "weights")
        else:
            st.caption(words.plain(methods.get(config.method).summary))
            charts.show(charts.scores(mode()), series.scores(state), "scores")
    with right:
        st.caption("The stack now, input at the bottom.")
        charts.show(charts.stack(mode()), series.stack(state), "stack")
    st.markdown(winner(state))


def winner(state: RunState) -> str:
    """The latest choice and how clear it was."""
    if not state.rounds:
        return f"Chosen: {words.layers(state.chosen)}." if state.chosen else "No layer is chosen yet."
    last = state.rounds[-1]
    text = f"Round {len(state.rounds)}: layer {last.layer} was chosen"
    if last.score is not None:
        text += f" at {words.number(last.score)}"
    if last.margin is not None and last.runner_up is not None:
        text += f", {words.number(last.margin)} below the runner-up, layer {last.runner_up}"
    return text + f". Chosen so far: {words.layers(state.chosen)}."


def stage_2(state: RunState, config: RunConfig) -> None:
    """How the knowledge moves."""
    st.markdown("#### Stage 2: move the knowledge")
    left, right = st.columns(2, gap="medium")
    with left:
        st.caption("Perplexity if the chosen layers were deleted now, on the same few blocks.")
        charts.show(charts.probes(mode()), series.probes(state, config), "probes")
    with right:
        st.caption("How much each chosen layer still changes what passes through it.")
        charts.show(charts.gaps(mode()), series.gaps(state, config), "gaps")


def loss_parts(state: RunState, config: RunConfig) -> None:
    """What is being minimised."""
    stages = [n for n, there in ((1, _learns(config)), (2, config.stage2_steps > 0)) if there]
    if not stages:
        return
    st.markdown("#### What is being minimised")
    for column, stage in zip(st.columns(2, gap="medium"), stages, strict=False):
        with column:
            st.caption(f"Stage {stage}: language-modelling loss, and {series.PULLS[stage]}.")
            spec = charts.losses(mode(), series.PULLS[stage])
            charts.show(spec, series.losses(state, config, stage), f"loss-{stage}")


def _learns(config: RunConfig) -> bool:
    """Whether the method learns layer weights in steps."""
    known = methods.all_methods().get(config.method)
    return bool(known and known.trains)


def samples(state: RunState) -> None:
    """What the models write, side by side."""
    if not state.samples:
        return
    st.markdown("#### The same prompt, continued")
    shown = [s for s in ("dense", "direct", "pruned") if s in state.samples]
    if state.samples.get("direct") == state.samples.get("pruned"):
        shown = [s for s in shown if s != "direct"]
    for column, name in zip(st.columns(len(shown), gap="medium"), shown, strict=True):
        sample = state.samples[name]
        with column, st.container(border=True):
            st.markdown(f"**{words.MODEL_STATES[name]}**")
            st.caption(words.plain(sample.prompt))
            st.text(sample.text)


def config_of(run: Run) -> RunConfig | None:
    """The run's config, or an error box."""
    try:
        return run.config()
    except TrspError as error:
        st.error(f"{words.plain(error.message)} {words.plain(error.remedy)}", icon=":material/error:")
        return None


def actions(run: Run, config: RunConfig, status: str) -> None:
    """What can be done with this run."""
    with st.container(horizontal=True, key="actions"):
        if status in ("queued", "running"):
            label = "Take out of the queue" if status == "queued" else "Stop"
            st.button(
                label, icon=":material/stop:", key="stop", disabled=run.cancelled(), on_click=stop, args=(run.id,)
            )
        else:
            if st.button("Run again", icon=":material/replay:", key="again", help="A new run with the same settings."):
                planner.start(config)
            st.button(
                "Change and run again", icon=":material/tune:", key="change", on_click=planner.change, args=(config,)
            )
        st.button("New run", icon=":material/add:", key="new", on_click=session.leave_run)
        planner.command(config)


def stop(run_id: str) -> None:
    """Ask the run to stop; a callback."""
    with contextlib.suppress(TrspError):  # it was deleted meanwhile
        server.jobs().cancel(run_id)


def next_steps(run: Run) -> None:
    """Where to go from a finished run."""
    with st.container(horizontal=True, key="next"):
        st.page_link(
            "pages/views/layers.py",
            label="See its layers, before and after",
            icon=":material/layers:",
            query_params={"run": run.id},
        )
