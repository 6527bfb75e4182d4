"""Try it yourself: take layers out of the stack by hand, and see at once what that costs."""

from __future__ import annotations

import dataclasses

import streamlit as st

from pages.ui.app_state import server, session, url_state, workbench
from pages.ui.charts import drawing, layer_rows
from pages.ui.run import start
from pages.ui.style import theme, words
from pages.ui.what_if import history, leaderboard, requests
from pages.ui.what_if.history import Choice, Trials
from trsp_core import formatting
from trsp_core.charts.palette import PALETTES
from trsp_core.pruning import methods
from trsp_core.runs.store import Run
from trsp_core.schema import messages as an
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.schema.messages import SetMeasured
from trsp_core.schema.run_state import RunState
from trsp_core.workbench.client import Reading

SMALL = (
    ".st-key-what-if-layers {gap:0.25rem}"
    ".st-key-what-if-layers [class*=st-key-layer-] {flex:1 1 1.9rem;max-width:4.5rem}"
    ".st-key-what-if-layers button {min-width:1.9rem;width:100%;padding:0.1rem}"
)


def section(run: Run, config: RunConfig, state: RunState) -> None:
    """The whole part of the page. Its fragment is drawn again while an answer is on its way. Buttons and figures come
    first: on a projector both are on one screen."""
    requests.begin(run, config, state.model.n_layers if state.model else 0)
    st.caption("Click a layer, or reach it by Tab and press Enter. The figures follow; nothing is trained.")
    st.fragment(_draw)(run, config, state)
    leaderboard.section(run, config, state)


def _draw(run: Run, config: RunConfig, state: RunState) -> None:
    """What a click changes; what an answer changes is drawn by itself, more often."""
    requests.take_in(run, config, state)
    live = requests.waited_for(run)
    now = requests.trials_of(run)
    depth = state.model.n_layers if state.model else 0
    if state.narrowed:
        st.caption("This run removed no layer, so it has no set to start from: here layers of the dense model go.")
    _presets(run, config, state, now)
    _buttons(run, config, now.now, depth)
    if error := session.get("what-if-error"):
        st.warning(words.plain(error), icon=":material/block:")
    pause = 0.8 * server.beat() - 0.6
    st.fragment(_answers, run_every=pause if any(live) else None)(run, config, state, live)


def _answers(run: Run, config: RunConfig, state: RunState, live: tuple[bool, bool]) -> None:
    """What is known of the set; drawn again while one of `live` is waited for."""
    alone = server.beat() == 1.0
    reading = requests.read(requests.key(run, "ticket"), wait=0.3 if any(live) and alone else 0.0)
    if live != requests.waited_for(run):
        st.rerun()
    measured = requests.take_in(run, config, state)
    now = requests.trials_of(run)
    if reading and not isinstance(reading.ending, an.Stopped):
        workbench.ended_badly(reading)
    _figures(measured, now.now, reading)
    fates = [now.now.fate(i) for i in range(state.model.n_layers if state.model else 0)]
    rows = layer_rows.frame(state, fates, session.get(requests.key(run, "influence")) or {})
    drawing.show(layer_rows.spec(theme.mode()), rows, "what-if-strip", _description(now.now, len(rows)))
    if any(rows["frozen"]):
        st.caption("Outlined bars: layers that the run chose, with their weight of that moment; the others sank on.")
    if measured:
        _sample(reading, config)
    _board(run, config, now)


def _presets(run: Run, config: RunConfig, state: RunState, now: Trials) -> None:
    """Undo, redo, ready sets, and what a click means."""

    def put(removed: frozenset[int], who: str) -> None:
        requests.choose(run, config, requests.trials_of(run).choose(requests.trials_of(run).now.preset(removed, who)))

    def go(move: str) -> None:
        requests.choose(run, config, getattr(requests.trials_of(run), move)())

    def influence() -> None:
        if scores := session.get(requests.key(run, "influence")):
            requests.choose_by_influence(run, config, state, scores)
        else:
            session.put("what-if-wanted", requests.SHORTGPT)
            requests.rate(run, config)

    with st.container(horizontal=True, vertical_alignment="bottom", key="what-if-presets"):
        modes = ["Removes", "Protects"]
        key = url_state.linked("what-if-mode", modes[0], url_state.one_of(modes))
        st.segmented_control("A click", modes, key=key, required=True)
        for move, some, keys in (("undo", now.past, "Ctrl+Z"), ("redo", now.future, "Ctrl+Shift+Z")):
            icon = f":material/{move}:"
            st.button(
                move.capitalize(), icon=icon, disabled=not some, key=move, on_click=go, args=(move,), shortcut=keys
            )
        name = words.plain(_chooser(config))
        chosen = frozenset(state.chosen)
        st.button(f"As {name} chose", key="as-run", disabled=not chosen, on_click=put, args=(chosen, _chooser(config)))
        st.button(
            "As ShortGPT would choose", key="as-shortgpt", on_click=influence, disabled=not (chosen or now.now.removed)
        )
        st.button("None", key="as-dense", on_click=put, args=(frozenset(), "Dense"))


def _buttons(run: Run, config: RunConfig, now: Choice, depth: int) -> None:
    """A button a layer, coloured by its fate."""

    def toggle(layer: int) -> None:
        protecting = session.get("what-if-mode") == "Protects"
        changed = requests.trials_of(run).now.toggled(layer, protecting)
        if len(changed.removed) < depth:
            requests.choose(run, config, requests.trials_of(run).choose(changed))

    palette = PALETTES[theme.mode()]
    fills = {"removed": palette.removed, "protected": palette.dense}
    rules = [
        f".st-key-layer-{i} button,.st-key-layer-{i} button:is(:hover,:focus,:active) "
        f"{{background:{fills[now.fate(i)]};border-color:{fills[now.fate(i)]};color:#fff}}"
        for i in range(depth)
        if now.fate(i) in fills
    ]
    st.html("<style>" + SMALL + "".join(rules) + "</style>")
    with st.container(horizontal=True, gap="xsmall", key="what-if-layers"):
        for i in range(depth):
            label = {"removed": f"~~{i}~~", "protected": f":material/lock: {i}"}.get(now.fate(i), str(i))
            st.button(label, key=f"layer-{i}", on_click=toggle, args=(i,))


def _figures(measured: SetMeasured | None, now: Choice, reading: Reading | None) -> None:
    """What the set costs. The last figures stay until new ones are there, and what is waited for stands below them."""
    wait = f":material/hourglass_top: {workbench.waiting(reading) or 'Measuring.'}" if reading else ""
    if measured is None:
        st.caption(wait or "No set is measured yet. The first one takes some seconds: the model has to be loaded.")
        return
    fresh = frozenset(measured.removed) == now.removed
    with st.container(horizontal=True, key="what-if-figures"):
        for domain, title in (("calibration", "calibration"), ("heldout", "held out")):
            value, dense = measured.perplexity.get(domain), measured.dense.get(domain)
            times = f"{formatting.ratio(value / dense)} times dense" if value and dense else None
            label = f"Perplexity of one block, {title}"
            st.metric(label, formatting.perplexity(value), times, delta_color="off", delta_arrow="off")
        kl = measured.kl.get("heldout")
        st.metric("KL of one block, held out", "–" if kl is None else f"{formatting.nats(kl)} nats")
        fewer = measured.parameters_dense - measured.parameters
        less = f"{words.share(fewer, measured.parameters_dense)} fewer" if fewer else None
        st.metric("Parameters", formatting.parameters(measured.parameters), less, delta_color="off", delta_arrow="off")
        st.metric("Speed, at most", f"{formatting.ratio(measured.ceiling)} times")
    if fresh:
        how = (
            "known already"
            if measured.cached
            else f"{formatting.seconds(measured.seconds)}, {measured.layers_run} layer passes"
        )
        st.caption(
            f"Removed: {words.layers(measured.removed)}. {measured.tokens} predicted tokens of each domain ({how}): "
            "a quick figure, not a run's measurement."
        )
    else:
        st.caption(f"{wait} Shown: {words.layers(measured.removed)} removed.")


def _sample(reading: Reading | None, config: RunConfig) -> None:
    """What the thinned model writes. The box stays while it is empty, so that nothing below it moves."""
    pieces = [a.piece for a in reading.answers if isinstance(a, an.TokenGenerated)] if reading else []
    with st.container(border=True, key="what-if-sample"):
        st.markdown(f":gray[{words.lines(config.prompt)}]{words.lines(''.join(pieces))}")
        if reading and isinstance(reading.ending, an.Stopped):
            st.caption("Cut short, since others wait for their figures.")


def _board(run: Run, config: RunConfig, now: Trials) -> None:
    """The sets tried, best first; one click goes back to one; and the challenge."""
    if not now.measured_sets:
        return
    if verdict := history.verdict(now):
        st.markdown(verdict)

    def back() -> None:
        rows = session.get("what-if-board")["selection"]["rows"]
        if rows:
            removed = history.ordered_sets(requests.trials_of(run))[rows[0]]
            requests.choose(
                run, config, requests.trials_of(run).choose(Choice(removed, requests.trials_of(run).now.protected))
            )

    st.caption(
        "Sets tried, those of as many layers as now first, best first, on one block of each domain. Pick a row to go "
        "back to it."
    )
    number = st.column_config.NumberColumn(format=formatting.C_FIGURE)
    st.dataframe(
        history.board(now),
        hide_index=True,
        column_config=dict.fromkeys(("Times dense", "Calibration", "Held out", "KL held out"), number),
        key="what-if-board",
        on_select=back,
        selection_mode="single-row",
        alt="Sets of removed layers that were tried, with their perplexities.",
    )
    removed = sorted(now.now.removed)
    if removed:
        label = f"Run stage 2 on these {len(removed)} layers" if len(removed) > 1 else "Run stage 2 on this layer"
        if st.button(label, icon=":material/play_arrow:", type="primary", key="run-manual"):
            start.start(_by_hand(config, removed))


def _by_hand(config: RunConfig, removed: list[int]) -> RunConfig:
    """The run's settings with these layers; stage 2 as long as usual where the run had none."""
    steps = config.stage2_steps or int(KNOBS["stage2_steps"].default)
    return dataclasses.replace(config, method="manual", layers=",".join(map(str, removed)), stage2_steps=steps)


def _description(now: Choice, depth: int) -> str:
    return f"{depth} layers. Removed: {words.layers(sorted(now.removed))}."


def _chooser(config: RunConfig) -> str:
    return methods.get(config.method).title if config.method in methods.names() else config.method
