"""Run: fill the form and start; or watch the run in the address, live or long after."""

import streamlit as st

from pages.ui.app_state import server, session, url_state
from pages.ui.run import exports, form, model_picker, preview, results, run_status, stages, start, steering
from pages.ui.style import theme, words
from pages.ui.tour import classroom
from trsp_core.errors import TrspError


def show_form() -> None:
    """The settings of a new run, what they cost, and Start."""
    url_state.title("New run")
    url_state.left_out()
    draft = start.read_form()
    classroom.presets()
    form.first(draft.problems, model_picker.choose, start.ratio_in_words(draft), start.lambda_2_in_words(draft))
    if draft.missing:
        model_picker.box(draft.missing, draft.config)
    preview.area(draft)
    start.forecast_and_start(draft)
    st.markdown("#### More settings")
    form.more(draft.problems)
    session.write_address()
    server.run_queue().prepare()


def show_run(run_id: str) -> None:
    """One run, as it is now."""
    try:
        run = server.get_run(run_id)
    except TrspError as error:
        st.warning(f"{words.plain(error.message)} It may have been deleted.", icon=":material/link_off:")
        st.button("Start a new run", on_click=session.leave_run, type="primary")
        st.page_link("pages/views/runs.py", label="All runs", icon=":material/list:")
        return
    config = run_status.config_of(run)
    if config is None:
        return
    state, status = server.look(run)
    with st.container(horizontal=True, vertical_alignment="center"):
        run_status.title(run, config, state, status)
        again = run_status.actions(run, config, state, status)
    if again:
        start.start(config)
    beat = server.beat(state) if status in ("queued", "running") else None
    if beat:
        theme.keep_still()
    st.fragment(watch, run_every=beat)(run_id, status, beat)


def watch(run_id: str, last_status: str, beat: float | None) -> None:
    """What changes while the run goes on; drawn again each `beat` seconds."""
    try:
        run = server.get_run(run_id)
        config = run.config()
    except TrspError:  # deleted in another tab
        st.rerun()
    state, status = server.look(run)
    if status != last_status or (beat and not 0.7 < server.beat(state) / beat < 1.4):  # not for a little
        st.rerun()
    # Each part has its area from the first moment on, filled or not: one that came later would push the charts below
    # it to other nodes, and a browser would draw them anew.
    standing, numbers, result, remarks = (st.container() for _ in range(4))
    with standing:
        if status in ("queued", "running"):
            run_status.progress(run, state, status)
            if status == "running":
                steering.wheel(run, config, state)
        else:
            results.ending(run, state, status)
    with numbers:
        if state.model:
            run_status.figures(state, config, live=status == "running")
    with result:
        results.summary(state, config, live=status == "running")
        if status == "finished":
            run_status.next_steps(run)
            exports.area(run, config, state)
    with remarks:
        results.notes(state)
    if status != "queued":
        stages.draw(state, config, live=status == "running")


run_id = session.run_id()
if run_id:
    show_run(run_id)
else:
    show_form()
