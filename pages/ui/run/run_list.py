"""Runs as rows: in words, with their figures; and the choice of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.run import run_status
from pages.ui.style import words
from pages.ui.style.theme import STATUS_COLOURS, STATUS_ICONS
from trsp_core import escaping, formatting
from trsp_core.errors import TrspError
from trsp_core.export import model_card
from trsp_core.runs import replay
from trsp_core.runs.store import Run
from trsp_core.schema import codec, run_state, turns
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import KnobTurned

PER_PAGE = 10


def latest(count: int) -> None:
    """The newest runs, each with a link."""
    runs = server.runs()[:count]
    if not runs:
        st.caption("No runs yet. A Quick run takes about four minutes on two cores.")
        with st.container(horizontal=True):
            st.page_link("pages/views/run.py", label="Start one", icon=":material/play_arrow:")
            recorded("pages/views/run.py")
    for run in runs:
        row(run)


def recorded(page: str) -> None:
    """A link to the run that ships with the app, on `page`."""
    st.page_link(page, label="Open the recorded run", icon=":material/history:", query_params={"run": replay.RECORDED})


def row(run: Run, more: bool = False) -> None:
    """One run; with `more`, what can be done with it."""
    summary, status, config = figures(run)
    with st.container(border=True, key=f"row-{run.id}"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.badge(formatting.status(status).capitalize(), icon=STATUS_ICONS[status], color=STATUS_COLOURS[status])
            st.markdown(f"**{words.plain(_name(config, summary))}**", width="stretch")
            st.page_link(
                "pages/views/run.py", label="Open", icon=":material/open_in_full:", query_params={"run": run.id}
            )
            if more:
                _actions(run, config, status, [codec.build(KnobTurned, turn) for turn in summary["turns"]])
        st.caption(_figures_in_words(run, summary, status, with_size=more))


def figures(run: Run) -> tuple[dict[str, Any], str, RunConfig | None]:
    """Summary, status and config (None where it cannot be read), as cheaply as they can be had."""
    try:
        config = run.config()
    except TrspError:
        config = None
    if (run.folder / "summary.json").exists():
        summary = run.summary()
        return summary, run.status(summary["ended"]), config
    folded, status = server.look(run)
    return run_state.summary(folded), status, config


def _name(config: RunConfig | None, summary: dict[str, Any]) -> str:
    if config is None:
        return "A run whose settings cannot be read"
    return run_status.name_of(config, summary["n_layers"])


def _figures_in_words(run: Run, summary: dict[str, Any], status: str, with_size: bool) -> str:
    parts = [run_status.when(run)]
    by = summary["perplexity"]["calibration"]
    if "dense" in by and "pruned" in by:
        parts.append(f"perplexity {formatting.perplexity(by['dense'])} → {formatting.perplexity(by['pruned'])}")
    if summary["turns"]:
        parts.append("steered while it ran, so no evidence")
    if seconds := summary["seconds"]["total"]:
        spent = formatting.duration(seconds)
        parts.append(f"{spent} so far" if status == "running" else f"took {spent}")
    if with_size:
        parts.append(f"{formatting.size(run.size())} on disk")
    if summary["failure"]:
        parts.append(words.plain(f"{summary['failure']['message']} {summary['failure']['remedy']}"))
    if status == "lost":
        parts.append(f"{words.plain(run.hint())} Open it to go on with it or to run it again")
    return " · ".join(parts)


def _actions(run: Run, config: RunConfig | None, status: str, history: Sequence[KnobTurned]) -> None:
    if status in ("queued", "running"):
        run_status.stop_button(run, "Stop", f"stop-{run.id}")
    elif config and status in ("cancelled", "failed", "lost", "damaged"):
        run_status.resume_button(run, server.look(run)[0], f"resume-{run.id}")
    with st.popover("More", icon=":material/more_horiz:", key=f"more-{run.id}"):
        if config:
            st.caption("The same run from a shell:")
            st.code(escaping.lines(turns.command(config, history)), language="bash", wrap_lines=True)
            st.caption("And from Python:")
            st.code(model_card.script(config, history), language="python", wrap_lines=True)
        st.caption("Run folder:")
        st.code(run.id, language=None)
        if status != "running":
            st.caption(f"Deleting removes {formatting.size(run.size())}, the pruned model with it, for good.")
            st.button(
                "Delete this run", icon=":material/delete:", key=f"delete-{run.id}", on_click=_delete, args=(run.id,)
            )


def _delete(run_id: str) -> None:
    """A callback."""
    try:
        server.run_queue().cancel(run_id) if server.run_queue().position(run_id) else None
        server.store().delete(run_id)
    except (TrspError, OSError) as error:
        session.put("delete_error", str(error))
        return
    session.put("delete_error", "")
    if session.get("run") == run_id:
        session.leave_run()


def title(run: Run) -> str:
    summary, status, config = figures(run)
    suffix = ", steered" if summary["turns"] else ""
    return f"{_name(config, summary)} · {run_status.when(run)} · {formatting.status(status).capitalize()}{suffix}"
