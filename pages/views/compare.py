"""Compare: one prompt, up to three models writing side by side; then each text as the other models read it."""

import streamlit as st

from pages.ui.app_state import server, session, url_state, workbench
from pages.ui.compare import generation_form, side_by_side
from pages.ui.run import run_list, run_status
from pages.ui.style import words
from trsp_core.errors import TrspError
from trsp_core.runs.store import Run
from trsp_core.schema.messages import Generate
from trsp_core.workbench import transcript
from trsp_core.workbench.transcript import Comparison


def watch(run: Run, ticket: str, live: bool) -> None:
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
        generation_form.keep(run, reading.request, reading.answers, comparison)


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
run = run_list.choose(server.runs(), "pages/views/compare.py")
config = run_status.config_of(run) if run else None
if run is None or config is None:
    st.stop()
state, status = server.look(run)
run_status.title(run, config, state, status)

ticket, kept_name = session.ticket(), session.kept_comparison()
live = False
if ticket:
    try:
        reading = workbench.client().read(ticket)
        live = side_by_side.is_live(reading)
        generation_form.restore(reading.request)
    except TrspError:
        pass
generation_form.form(run, config, state, ticket if live else None)
if ticket:
    st.fragment(watch, run_every=0.25 if live else None)(run, ticket, live)
elif kept_name:
    show_kept(run, kept_name)
generation_form.kept_list(run, kept_name)
