"""Compare: one prompt, up to three models writing side by side; then each text as the other models read it."""

import streamlit as st

from pages.ui.app_state import session, url_state, workbench
from pages.ui.compare import generation_form, recorded_texts, side_by_side
from pages.ui.run import model_picker, run_list, start, subjects
from pages.ui.style import words
from trsp_core.errors import TrspError
from trsp_core.runs.store import Run
from trsp_core.schema.messages import Generate, Prepare
from trsp_core.workbench import transcript
from trsp_core.workbench.transcript import Comparison


def watch(run: Run | None, ticket: str, live: bool) -> None:
    """The texts as they are written; drawn again four times a second."""
    try:
        reading = workbench.client().follow(ticket, 0, 0.4)
    except TrspError as error:
        st.info(f"{words.plain(error.message)} Write again, or open a kept comparison.", icon=":material/history:")
        return
    if live and reading.ending is not None:
        st.rerun()
    if not isinstance(reading.request, Generate):
        st.info("These answers belong to another page. Write again.", icon=":material/link_off:")
        return
    workbench.standing(reading)
    comparison = transcript.gather(reading.request, reading.answers)
    if any(c.tokens for c in comparison.columns) or live:
        side_by_side.texts(comparison, live)
    if not live and any(c.tokens for c in comparison.columns):
        side_by_side.reading_along(comparison)
        if run:
            generation_form.keep(run, reading.request, reading.answers, comparison)
        else:
            generation_form.copy(comparison)


def show_kept(run: Run, name: str) -> None:
    """A comparison that was kept with the run."""
    try:
        request, answers = transcript.read(run, name)
    except TrspError as error:
        st.warning(f"{words.plain(error.message)} {words.plain(error.remedy)}", icon=":material/link_off:")
        return
    comparison: Comparison = transcript.gather(request, answers)
    st.caption(f":material/bookmark: Kept comparison {name}. Its address can be shared.")
    side_by_side.texts(comparison, live=False)
    side_by_side.reading_along(comparison)
    generation_form.copy(comparison)


url_state.title("Compare")
subject = subjects.choose()
if subject is None:
    st.stop()
subjects.title(subject)
if subject.run is None:
    subject = subjects.recorded_default()
    if start.fetchable(subject.config.model):
        model_picker.box(subject.config.model)
workbench.prepare(Prepare(subject.config.model))

ticket, kept_name = session.ticket(), session.kept_comparison()
live = False
if ticket:
    try:
        reading = workbench.client().read(ticket)
        live = side_by_side.is_live(reading)
        generation_form.restore(reading.request)
    except TrspError:
        pass
generation_form.form(subject, ticket if live else None)
if ticket:
    st.fragment(watch, run_every=0.25 if live else None)(subject.run, ticket, live)
elif kept_name and subject.run:
    show_kept(subject.run, kept_name)
else:
    recorded_texts.show(subject)
if subject.run:
    generation_form.kept_list(subject.run, kept_name)
else:
    run_list.recorded("pages/views/compare.py")
