"""What a page says of a run: which it is, where it stands, what can be done with it."""

from __future__ import annotations

import contextlib
import math

import streamlit as st

from pages.ui.app_state import server, session, url_state
from pages.ui.run import start
from pages.ui.run.form import title_of
from pages.ui.style import words
from pages.ui.style.theme import STATUS_COLOURS, STATUS_ICONS
from trsp_core import formatting
from trsp_core.charts import frames
from trsp_core.errors import TrspError
from trsp_core.pruning import methods, transfers
from trsp_core.runs import resume
from trsp_core.runs.store import Run
from trsp_core.schema import turns
from trsp_core.schema.config import RunConfig, count_to_remove
from trsp_core.schema.run_state import RunState


def title(run: Run, config: RunConfig, state: RunState, status: str) -> None:
    """Which run this is, and how it stands."""
    badge = f":{STATUS_COLOURS[status]}-badge[{STATUS_ICONS[status]} {formatting.status(status).capitalize()}]"
    with st.container():
        badge += f" {words.STEERED}" if state.turns else ""
        st.markdown(f"#### {words.plain(name_of(config, state.model.n_layers if state.model else None))} {badge}")
        text = words.TEXTS.get(config.text) or title_of(config.text)
        transfer = transfers.all_transfers().get(config.transfer)
        move = f" · {words.plain(transfer.title)}" if transfer and config.transfer != "penalty" else ""
        st.caption(f"{when(run)} · {words.plain(text)}{move} · run {run.id}")


def name_of(config: RunConfig, depth: int | None) -> str:
    """`TRSP on SmolLM2 135M Instruct, 8 of 30 layers`; where the run does not know its `depth` yet, the files may."""
    method, facts = methods.all_methods().get(config.method), server.facts(config.model)
    what = f"{method.title if method else config.method} on {title_of(config.model)}"
    if depth is None and not isinstance(facts, TrspError):
        depth = facts.n_layers
    if depth and method and method.narrow:
        return f"{what}, the size of {depth - count_to_remove(config, depth)} of {depth} layers"
    if depth:
        return f"{what}, {count_to_remove(config, depth)} of {depth} layers"
    return f"{what}, ratio {formatting.setting(config.ratio)}" if config.method != "manual" else what


def chooser(config: RunConfig) -> str:
    """The method that chose the layers, by its title."""
    return methods.get(config.method).title if config.method in methods.names() else config.method


def when(run: Run) -> str:
    try:
        return words.when(run.id, run.folder.stat().st_mtime)
    except OSError:
        return ""


def progress(run: Run, state: RunState, status: str) -> None:
    """The bar with the phase in words and the time left, and the strip of all phases."""
    if status == "queued" and (trouble := server.run_queue().start_failure(run.id)):
        st.error(f"**This run could not be started.** {words.plain(trouble)}", icon=":material/error:")
        return
    if status == "queued":
        place = server.run_queue().position(run.id)
        ahead = f"place {place} in the queue" if place > 1 else "next in the queue"
        st.progress(0.0, text=f"Waiting: {ahead}. It starts by itself; this page may be closed.")
        return
    seconds_left = state.seconds_left
    text = words.phase(state.phase) if state.phase else "Starting its process"
    if (layer := frames.repairing(state)) is not None:
        text += f", now layer {layer} ({len(state.refits) + 1} of {len(state.repair_layers)})"
    if run.cancelled():
        text = "Stopping after the step at hand"
    elif state.paused:
        text += " · paused"
    elif seconds_left is not None:
        text += f" · about {formatting.duration(seconds_left)} left"
    st.progress(state.fraction, text=text)
    strip(state)


def strip(state: RunState) -> None:
    """All phases in order: done, now, to come."""
    now, marks = state.phase_number, []
    for i, name in enumerate(p["name"] for p in state.phases):
        label = words.SHORT_PHASES.get(name, words.phase(name))
        if i < now or state.ended == "finished":
            marks.append(f":gray-badge[:material/check: {label}]")
        else:
            marks.append(f":blue-badge[**{label}**]" if i == now else f":gray[:small[· {label}]]")
    st.markdown(" ".join(marks) or ":gray[The phases follow in a moment]")


def figures(state: RunState, config: RunConfig, live: bool) -> None:
    """The numbers of the moment: of all measured blocks, where a tile does not say otherwise."""
    by = state.figures("calibration")

    def level(name: str) -> str:
        return words.perplexity_or_wait(by, name, live) if name in by or state.phase == name else "–"

    total = frames.expected_removals(state, config)
    with st.container(horizontal=True, key="figures"):
        if methods.get(config.method).narrow:
            depth = state.model.n_layers if state.model else 0
            st.metric("Layers narrowed", f"{depth if state.narrowed else 0} of {depth}")
        else:
            st.metric("Layers chosen", f"{len(state.chosen)} of {total}" if total else "0")
        st.metric("Perplexity, dense", level("dense"))
        at_once = "Narrowed, not trained" if methods.get(config.method).narrow else "Layers deleted at once"
        st.metric(at_once, level("direct"))
        few, whole = frames.compared(state, config)
        now, when = _now(state, config)
        if "pruned" in by or now is None:
            st.metric("Pruned", level("pruned"))
        else:
            value = f"{words.times(now)} dense" if math.isfinite(now) else formatting.NOT_A_NUMBER
            st.metric(f"If {when}, on {few} of {whole} blocks", value)
        st.metric("Time so far" if not state.ended else "Time", formatting.duration(state.at))
    if state.turns:
        st.caption(words.plain(turns.account(state.turns)))


def _now(state: RunState, config: RunConfig) -> tuple[float | None, str]:
    """The latest probe as a multiple of the dense model's perplexity, and what it supposes; None before the first."""
    points, when = [], ""
    if state.probes:
        points, when = frames.times_dense(state, config)[1], "deleted now"
    elif state.repair_probes:
        points, when = frames.times_dense_in_repair(state, config)[1], "it stopped here"
    return (points[-1][1] if points else None), when


def config_of(run: Run) -> RunConfig | None:
    """The run's config, or an error box."""
    try:
        return run.config()
    except TrspError as error:
        st.error(f"{words.plain(error.message)} {words.plain(error.remedy)}", icon=":material/error:")
        return None


def actions(run: Run, config: RunConfig, state: RunState, status: str) -> bool:
    """What can be done with this run; whether it is to be run again."""
    again = False
    with st.container(horizontal=True, gap="xsmall", key="actions", width="content"):
        if status in ("queued", "running"):
            stop_button(run, "Take out of the queue" if status == "queued" else "Stop", "stop")
        else:
            if resume.can(state, status):
                resume_button(run, state, "resume")
            again = st.button("Run again", icon=":material/replay:", key="again", help="The same settings.")
            st.button("Change", icon=":material/tune:", key="change", on_click=start.change, args=(config,))
        if server.run_queue().limits.deletes_runs:
            tip = (
                f"This server deletes runs after {formatting.setting(server.run_queue().limits.days)} days, or "
                "when the "
                "disk gets short."
            )
            st.toggle("Keep", run.is_kept(), key=f"keep-{run.id}", help=tip, on_change=keep, args=(run,))
        st.button("New run", icon=":material/add:", key="new", on_click=session.leave_run)
        start.command(config, history=state.turns)
        url_state.copy("Link")
    resume_refused()
    return again


def stop_button(run: Run, label: str, key: str) -> None:
    """A button that stops a run; it has stopped once its process has let go of it."""
    stopping = run.cancelled()
    label = "Stopping…" if stopping else label
    st.button(label, icon=":material/stop:", key=key, disabled=stopping, on_click=stop, args=(run.id,))


def resume_button(run: Run, state: RunState, key: str) -> None:
    """A button that puts a run which broke off into the queue again; it says before what that repeats."""
    tip = f"To the end that it would have had. {resume.outlook(run, state)}"
    st.button("Resume", icon=":material/resume:", key=key, help=tip, on_click=go_on, args=(run.id,))


def resume_refused() -> None:
    """Why the last press of that button did nothing, once."""
    if refusal := session.get("resume_error"):
        session.put("resume_error", "")
        st.error(refusal, icon=":material/error:")


def stop(run_id: str) -> None:
    """Ask the run to stop; a callback."""
    with contextlib.suppress(TrspError):  # it was deleted meanwhile
        server.run_queue().cancel(run_id)


def keep(run: Run) -> None:
    """Let the run stay, or let it go; a callback."""
    with contextlib.suppress(OSError):  # it was deleted meanwhile
        run.keep(bool(session.get(f"keep-{run.id}")))


def go_on(run_id: str) -> None:
    """Put the run into the queue again; a callback."""
    try:
        server.run_queue().resume(run_id, session.mine(), session.visitor())
    except (TrspError, OSError) as error:
        session.put("resume_error", words.plain(str(error)))


def next_steps(run: Run) -> None:
    """Where to go from a finished run."""
    with st.container(horizontal=True, key="next"):
        st.page_link(
            "pages/views/layers.py",
            label="See its layers, before and after",
            icon=":material/layers:",
            query_params={"run": run.id},
        )
        st.page_link(
            "pages/views/compare.py",
            label="Compare what both models write",
            icon=":material/compare_arrows:",
            query_params={"run": run.id},
        )
        st.page_link(
            "pages/views/home.py", label="Replay it", icon=":material/replay:", query_params={"replay": run.id}
        )
