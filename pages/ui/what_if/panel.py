"""Try it yourself: take layers out of the stack by hand, and see at once what that costs."""

from __future__ import annotations

import dataclasses

import streamlit as st

from pages.ui.app_state import server, session, url_state, workbench
from pages.ui.charts import drawing, layer_rows
from pages.ui.run import start
from pages.ui.run.subjects import Subject
from pages.ui.style import theme, words
from pages.ui.what_if import history, leaderboard, requests
from pages.ui.what_if.history import Choice, Trials
from trsp_core import formatting
from trsp_core.charts.palette import PALETTES
from trsp_core.schema import messages as an
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.schema.messages import SetMeasured
from trsp_core.workbench.client import Reading

SMALL = (
    ".st-key-what-if-layers {gap:0.25rem}"
    ".st-key-what-if-layers [class*=st-key-layer-] {flex:1 1 1.9rem;max-width:4.5rem}"
    ".st-key-what-if-layers button {min-width:1.9rem;width:100%;padding:0.1rem}"
)


def section(subject: Subject) -> None:
    """The whole part of the page. Its fragment is drawn again while an answer is on its way. Buttons and figures come
    first: on a projector both are on one screen."""
    requests.begin(subject)
    st.caption("Click a layer, or reach it by Tab and press Enter. The figures follow; nothing is trained.")
    st.fragment(_draw)(subject)
    if subject.run:
        leaderboard.section(subject.run, subject.config, subject.state)


def _draw(subject: Subject) -> None:
    """What a click changes; what an answer changes is drawn by itself, more often."""
    requests.take_in(subject)
    live = requests.waited_for(subject)
    now = requests.trials_of(subject)
    if subject.state.narrowed:
        st.caption("This run removed no layer, so it has no set to start from: here layers of the dense model go.")
    _presets(subject, now)
    _buttons(subject, now.now)
    if error := session.get("what-if-error"):
        st.warning(words.plain(error), icon=":material/block:")
    pause = 0.8 * server.beat() - 0.6
    st.fragment(_answers, run_every=pause if any(live) else None)(subject, live)


def _answers(subject: Subject, live: tuple[bool, bool]) -> None:
    """What is known of the set; drawn again while one of `live` is waited for."""
    alone = server.beat() == 1.0
    reading = requests.read(requests.key(subject.id, "ticket"), wait=0.3 if any(live) and alone else 0.0)
    if live != requests.waited_for(subject):
        st.rerun()
    measured = requests.take_in(subject)
    now = requests.trials_of(subject)
    if reading and not isinstance(reading.ending, an.Stopped):
        workbench.ended_badly(reading)
    _figures(measured, now.now, reading)
    fates = [now.now.fate(i) for i in range(subject.depth)]
    rows = layer_rows.frame(subject.state, fates, session.get(requests.key(subject.id, "influence")) or {})
    drawing.show(layer_rows.spec(theme.mode()), rows, "what-if-strip", _description(now.now, len(rows)))
    if any(rows["frozen"]):
        st.caption("Outlined bars: layers that the run chose, with their weight of that moment; the others sank on.")
    if measured:
        _sample(reading, subject.config)
    _board(subject, now)


def _presets(subject: Subject, now: Trials) -> None:
    """Undo, redo, ready sets, and what a click means."""

    def put(removed: frozenset[int], who: str) -> None:
        trials = requests.trials_of(subject)
        requests.choose(subject, trials.choose(trials.now.preset(removed, who)))

    def go(move: str) -> None:
        requests.choose(subject, getattr(requests.trials_of(subject), move)())

    def influence() -> None:
        if scores := session.get(requests.key(subject.id, "influence")):
            requests.choose_by_influence(subject, scores)
        else:
            session.put("what-if-wanted", requests.SHORTGPT)
            requests.rate(subject)

    with st.container(horizontal=True, vertical_alignment="bottom", key="what-if-presets"):
        modes = ["Removes", "Protects"]
        key = url_state.linked("what-if-mode", modes[0], url_state.one_of(modes))
        st.segmented_control("A click", modes, key=key, required=True)
        for move, some, keys in (("undo", now.past, "Ctrl+Z"), ("redo", now.future, "Ctrl+Shift+Z")):
            icon = f":material/{move}:"
            st.button(
                move.capitalize(), icon=icon, disabled=not some, key=move, on_click=go, args=(move,), shortcut=keys
            )
        name = words.plain(subject.chooser) if subject.run else "the recorded run"
        chosen = frozenset(subject.reference)
        st.button(f"As {name} chose", key="as-run", disabled=not chosen, on_click=put, args=(chosen, subject.chooser))
        st.button(
            "As ShortGPT would choose", key="as-shortgpt", on_click=influence, disabled=not (chosen or now.now.removed)
        )
        st.button("None", key="as-dense", on_click=put, args=(frozenset(), "Dense"))


def _buttons(subject: Subject, now: Choice) -> None:
    """A button a layer, coloured by its fate."""

    def toggle(layer: int) -> None:
        protecting = session.get("what-if-mode") == "Protects"
        changed = requests.trials_of(subject).now.toggled(layer, protecting)
        if len(changed.removed) < subject.depth:
            requests.choose(subject, requests.trials_of(subject).choose(changed))

    palette = PALETTES[theme.mode()]
    fills = {"removed": palette.removed, "protected": palette.dense}
    rules = [
        f".st-key-layer-{i} button,.st-key-layer-{i} button:is(:hover,:focus,:active) "
        f"{{background:{fills[now.fate(i)]};border-color:{fills[now.fate(i)]};color:#fff}}"
        for i in range(subject.depth)
        if now.fate(i) in fills
    ]
    st.html("<style>" + SMALL + "".join(rules) + "</style>")
    with st.container(horizontal=True, gap="xsmall", key="what-if-layers"):
        for i in range(subject.depth):
            label = {"removed": f"~~{i}~~", "protected": f":material/lock: {i}"}.get(now.fate(i), str(i))
            st.button(label, key=f"layer-{i}", on_click=toggle, args=(i,))


def _figures(measured: SetMeasured | None, now: Choice, reading: Reading | None) -> None:
    """What the set costs. The last figures stay until new ones are there, and what is waited for stands below them."""
    wait = f":material/hourglass_top: {workbench.waiting(reading) or 'Measuring.'}" if reading else ""
    if measured is None:
        st.caption(wait or "No set is measured yet: click a layer.")
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
        how = f"{formatting.seconds(measured.seconds)}, {measured.layers_run} layer passes"
        how = "recorded, with the app" if measured.recorded else "known already" if measured.cached else how
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


def _board(subject: Subject, now: Trials) -> None:
    """The sets tried, best first; one click goes back to one; and the challenge."""
    if not now.measured_sets:
        return
    if verdict := history.verdict(now):
        st.markdown(verdict)

    def back() -> None:
        rows = session.get("what-if-board")["selection"]["rows"]
        if rows:
            removed = history.ordered_sets(requests.trials_of(subject))[rows[0]]
            requests.choose(
                subject, requests.trials_of(subject).choose(Choice(removed, requests.trials_of(subject).now.protected))
            )

    st.caption(
        "Sets tried, those of as many layers as now first, best first, on one block of each domain. Pick a row to go "
        "back to it."
    )
    st.dataframe(
        history.board(now).style.format(history.LOOKS, na_rep="–"),
        hide_index=True,
        key="what-if-board",
        on_select=back,
        selection_mode="single-row",
        alt="Sets of removed layers that were tried, with their perplexities.",
    )
    removed = sorted(now.now.removed)
    if removed:
        label = f"Run stage 2 on these {len(removed)} layers" if len(removed) > 1 else "Run stage 2 on this layer"
        if st.button(label, icon=":material/play_arrow:", type="primary", key="run-manual"):
            start.start(_by_hand(subject.config, removed))


def _by_hand(config: RunConfig, removed: list[int]) -> RunConfig:
    """The run's settings with these layers; stage 2 as long as usual where the run had none."""
    steps = config.stage2_steps or int(KNOBS["stage2_steps"].default)
    return dataclasses.replace(config, method="manual", layers=",".join(map(str, removed)), stage2_steps=steps)


def _description(now: Choice, depth: int) -> str:
    return f"{depth} layers. Removed: {words.layers(sorted(now.removed))}."
