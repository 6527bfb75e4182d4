"""The two stages of a run in charts, and what the models write."""

from __future__ import annotations

import math
from functools import partial

import streamlit as st

from pages.ui.charts import drawing
from pages.ui.style import words
from pages.ui.style.theme import mode
from trsp_core import formatting
from trsp_core.charts import frames, specs
from trsp_core.pruning import methods, transfers
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState

SAMPLE = 200  # pixels: the height that is reserved for a text


def draw(state: RunState, config: RunConfig, live: bool) -> None:
    """All charts: of a live run also those that wait for their data, so that nothing jumps; else those with data.

    What moves is on top: of a live run the repair while it goes on, then stage 2 from its first step on, above stage 1.
    Each has an area of its own there, so that no other chart is drawn anew for it.
    """
    first = bool(live or state.weight_steps or state.chosen) and not methods.get(config.method).narrow
    second = bool(config.stage2_steps and (live or state.gap_steps))
    repaired = bool(state.refits or (live and climbs(config)))
    steps_above, repair_above, middle, repair_below, steps_below, losses = (st.container() for _ in range(6))
    if first:
        with middle:
            stage_1(state, config)
    if repaired:
        with repair_above if live and (state.refits or state.phase == "repair") else repair_below:
            repair(state, config)
    if second:
        with steps_above if live and state.gap_steps else steps_below:
            stage_2(state, config)
    with losses:
        loss_parts(state, config, [n for n, there in ((1, first and _learns(config)), (2, second)) if there])
    samples(state, config)


def stage_1(state: RunState, config: RunConfig) -> None:
    """How the layers are chosen."""
    trains = bool(state.weight_steps) or _learns(config)
    st.markdown("#### Stage 1: which layers matter least" if trains else "#### Choosing the layers")
    scored = trains or bool(state.scores) or not state.chosen  # layers that were named, or drawn, have no scores
    left_column, right_column = st.columns([2, 1], gap="medium") if scored else (None, st.columns(2)[0])
    if left_column is not None:
        with left_column:
            _choice(state, config, trains)
    with right_column:
        st.caption(frames.caption("stack", state, config))
        drawing.of_run(specs.stack(mode()), state, lambda: frames.stack(state), "stack")
    with st.container(key="winner"):
        st.markdown(winner(state))


def _choice(state: RunState, config: RunConfig, trains: bool) -> None:
    """By what the layers are chosen: their weights over the steps, or a method's scores."""
    if trains:
        st.caption(frames.caption("weights", state, config))
        expected_steps = frames.expected_steps(state, config, 1)
        drawing.of_run(specs.weights(mode()), state, lambda: frames.weights(state, expected_steps), "weights")
    else:
        st.caption(words.plain(methods.get(config.method).summary))
        drawing.of_run(specs.scores(mode()), state, lambda: frames.scores(state), "scores")


def winner(state: RunState) -> str:
    """The latest choice and how clear it was."""
    if not state.rounds:
        return f"Chosen: {words.layers(state.chosen)}." if state.chosen else "No layer is chosen yet."
    last = state.rounds[-1]
    text = f"No. {len(state.rounds)}: layer {last.layer}"
    if last.score is not None and state.weight_steps:
        weight = formatting.figure(abs(last.score))
        text += f" had the smallest weight of those left, {weight}"
        if not frames.sank_furthest(state):
            text = f"No. {len(state.rounds)}: of the smallest weights, layer {last.layer} at {weight} is missed least"
    else:
        text += " was chosen" + (f" at {formatting.figure(last.score)}" if last.score is not None else "")
    if last.margin is not None and last.runner_up is not None:
        text += f", {formatting.margin(last.margin)} below the runner-up, layer {last.runner_up}"
    return text + f". Chosen so far: {words.layers(state.chosen)}."


def climbs(config: RunConfig) -> bool:
    """Whether the run's transfer repairs layer by layer."""
    transfer = transfers.all_transfers().get(config.transfer)
    return bool(transfer and transfer.in_order)


def repair(state: RunState, config: RunConfig) -> None:
    """How the kept layers take over, one after the other, and what has come of it so far."""
    st.markdown("#### Stage 2: the kept layers take over")
    left_column, right_column = st.columns(2, gap="medium")
    with left_column:
        st.caption(frames.caption("refits", state, config))
        drawing.of_run(specs.refits(mode()), state, lambda: frames.refits(state, config), "refits")
    with right_column:
        st.caption(frames.caption("repair-probes", state, config))
        rows = partial(frames.repair_probes, state, config)
        drawing.of_run(specs.repair_probes(mode()), state, rows, "repair-probes")
    with st.container(key="repaired-layer"):
        st.markdown(latest_repair(state))


def latest_repair(state: RunState) -> str:
    """The layer at hand, and how near the latest one came."""
    planned = frames.repair_layers(state)
    now, text = frames.repairing(state), "No layer is repaired yet."
    if state.refits:
        last = state.refits[-1]
        before, after = (
            formatting.percent(far) if math.isfinite(far) else formatting.NOT_A_NUMBER
            for far in (last.before, last.after)
        )
        text = (
            f"Layer {last.layer}'s output was {before} off the dense model's state, and is {after} off now: "
            f"{len(state.refits)} of {len(planned)} layers are repaired."
        )
    return text + (f" Now layer {now}." if now is not None else "")


def stage_2(state: RunState, config: RunConfig) -> None:
    """How the knowledge moves, or what training adds to a repair."""
    st.markdown("#### Stage 2: train what is left" if state.refits else "#### Stage 2: move the knowledge")
    left_column, right_column = (st.container(), None) if config.deletes_first else st.columns(2, gap="medium")
    with left_column:
        st.caption(frames.caption("probes", state, config))
        drawing.of_run(specs.probes(mode()), state, lambda: frames.probes(state, config), "probes")
    if right_column is None:  # no chosen layer is left whose gap could close
        return
    with right_column:
        st.caption(frames.caption("gaps", state, config))
        drawing.of_run(specs.gaps(mode()), state, lambda: frames.gaps(state, config), "gaps")


def loss_parts(state: RunState, config: RunConfig, stages: list[int]) -> None:
    """What is being minimised in these stages."""
    if not stages:
        return
    st.markdown("#### What is being minimised")
    for column, stage in zip(st.columns(2, gap="medium"), stages, strict=False):
        with column:
            st.caption(frames.caption(f"loss-{stage}", state, config))
            spec = specs.losses(mode(), frames.PULLS[stage])
            drawing.of_run(spec, state, lambda s=stage: frames.losses(state, config, s), f"loss-{stage}")


def _learns(config: RunConfig) -> bool:
    """Whether the method learns layer weights in steps."""
    method = methods.all_methods().get(config.method)
    return bool(method and method.trains)


def samples(state: RunState, config: RunConfig, reserve: bool = False) -> None:
    """What the models write, side by side. `reserve`: with boxes from the start, so that nothing below moves."""
    if not (state.samples or reserve):
        return
    st.markdown("#### The same prompt, continued")
    states = [s for s in ("dense", "direct", "pruned") if s in state.samples or reserve]
    if state.samples.get("direct") == state.samples.get("pruned") and not reserve:
        states = [s for s in states if s != "direct"]
    for column, name in zip(st.columns(len(states), gap="medium"), states, strict=True):
        with column, st.container(border=True, height=SAMPLE if reserve else "content"):
            st.markdown(f"**{words.states_of(config)[name]}**")
            sample = state.samples.get(name)
            st.caption(words.plain(sample.prompt) if sample else "Not yet written")
            st.text(sample.text if sample else "")
