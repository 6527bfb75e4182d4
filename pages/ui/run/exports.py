"""What a visitor takes away: the model with its proof, the report, the curves. Each is made at once or in a process of
its own, which no tab has to wait for; then it lies in the run folder and is streamed from there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from pages.ui.app_state import file_routes, server, session
from pages.ui.style import words
from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.export import checkpoint, curves_csv
from trsp_core.export.export_queue import ExportJob
from trsp_core.files import write_atomic
from trsp_core.runs.store import Run
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState

REPORT, CURVES = "report.html", "curves.csv"


def area(run: Run, config: RunConfig, state: RunState) -> None:
    """What can be taken away from a finished run."""
    with st.container(border=True, key="takeaway"):
        st.markdown("#### Take it away")
        if not run.proof_file.is_file() or not run.model_folder.is_dir():
            st.caption("This run kept no model to export with proof. Run it again with “Keep the pruned model” on.")
        else:
            _model(run)
        with st.container(horizontal=True):
            target = str(run.exports_folder / REPORT)
            _file(
                run,
                REPORT,
                "HTML report",
                "One file, charts inside, opens offline.",
                lambda: server.export_queue().start(
                    run, REPORT, "trsp_core.export.html_report", session.visitor(), target=target
                ),
            )
            _file(run, CURVES, "Curves, CSV", "Every curve, a row a point.", lambda: _curves(run, config, state))
        for job in server.export_queue().of(run):
            _standing(job)


def _model(run: Run) -> None:
    """The checkpoints that are there, and the making of another."""
    for archive in checkpoint.archives(run):
        label = f"Download {archive.file.name} ({formatting.size(archive.size)})"
        st.link_button(label, file_routes.link(run, archive.file.name), icon=":material/download:")
        st.caption(f":material/verified: {words.plain(archive.verdict)}")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        formats = checkpoint.formats(run)
        dtype = st.selectbox("Number format", formats, key="export-dtype", width=160) if formats else ""
        exporting = st.button("Export the model", icon=":material/deployed_code:", key="export")
        with st.popover("Push to the hub", icon=":material/cloud_upload:"):
            push = _push_form()
    st.caption(
        "A checkpoint for stock transformers with a model card, the settings and, where it gives the same tensors, a "
        "recipe for mergekit. A fresh process loads it first and must compute what the model in memory computed, or "
        "there is no export."
        + ("" if formats else " Packed weights stay as they are, with their adapters beside them.")
    )
    for remark in checkpoint.remarks(run, dtype):
        st.caption(words.plain(remark))
    if exporting or push:
        repository, token = push or ("", "")
        target = checkpoint.archive(run, dtype)
        request: dict[str, Any] = {"target": str(target), "dtype": dtype, "push": repository, "token": token}
        name = f"{target.name} to {repository}" if push else target.name
        _try(
            lambda: server.export_queue().start(run, name, "trsp_core.export.checkpoint", session.visitor(), **request)
        )


def _push_form() -> tuple[str, str] | None:
    """Repository and token, at the moment they are sent; the form forgets them at once."""
    with st.form("push", clear_on_submit=True, border=False):
        name = st.text_input("Repository", placeholder="owner/name", key="push-name")
        token = st.text_input(
            "Your token", type="password", key="push-token", help="Used for this upload, and stored nowhere."
        )
        st.caption("A new repository is private.")
        if not st.form_submit_button("Export and push", icon=":material/cloud_upload:"):
            return None
    if not name.strip() or not token.strip():
        st.error("A repository and a token with the right to write are needed.")
        return None
    return name.strip(), token.strip()


def _file(run: Run, name: str, label: str, text: str, make: Callable[[], None]) -> None:
    """A button that has the file made, or the link to it where it is there."""
    if (run.exports_folder / name).is_file():
        st.link_button(label, file_routes.link(run, name), icon=":material/download:", help=text)
    elif st.button(f"Make: {label}", key=f"make-{name}", icon=":material/description:", help=text):
        _try(make)


def _curves(run: Run, config: RunConfig, state: RunState) -> None:
    run.exports_folder.mkdir(exist_ok=True)
    write_atomic(run.exports_folder / CURVES, curves_csv.table(config, state))


def _try(make: Callable[[], None]) -> None:
    """Make it, or begin to, and draw the page again; or say why that cannot be."""
    try:
        make()
    except TrspError as error:
        st.error(f"{words.plain(error.message)} {words.plain(error.remedy)}", icon=":material/error:")
        return
    except OSError as error:
        st.error(f"It could not be written: {words.plain(error.strerror or '')}. Free some space.")
        return
    st.rerun()


def _standing(job: ExportJob) -> None:
    """How far a job is; why it ended, or what a push came to. What was made stands above, with its link."""
    if job.running:
        st.fragment(_progress, run_every=1.0)(job)
    elif job.refusal:
        message = f"{words.plain(job.refusal.message)} {words.plain(job.refusal.remedy)}"
        st.error(f"{words.plain(job.name)}: {message}", icon=":material/error:")
    elif job.done and " to " in job.name:
        st.success(f"Uploaded: {words.plain(job.name)}.", icon=":material/cloud_done:")


def _progress(job: ExportJob) -> None:
    """Its place in the queue or its progress, with a way to stop it; drawn again each second."""
    if not job.running:
        st.rerun()
    place = server.export_queue().place(job)
    doing = f"place {place} in the queue" if place else job.progress.message
    share = min(max(job.progress.fraction, 0.0), 1.0)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.progress(share, text=f"{words.plain(job.name)}: {words.plain(doing)}")
        label, key = "Stopping" if job.stopping else "Stop", f"stop-{job.name}"
        st.button(label, disabled=job.stopping, key=key, on_click=server.export_queue().stop, args=(job,))
