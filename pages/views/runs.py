"""Runs: every run on this machine, newest first; open one, stop it, delete it."""

import streamlit as st

from pages.ui.app_state import server, session, url_state
from pages.ui.run import run_list, run_status
from pages.ui.style import words

url_state.title("Runs")
everything = server.runs()
if not everything:
    st.info("No runs yet. A Quick run takes about four minutes on two cores.", icon=":material/info:")
    st.page_link("pages/views/run.py", label="Start a run", icon=":material/play_arrow:")
    st.stop()

if session.get("delete_error"):
    st.error(words.plain(session.get("delete_error")), icon=":material/error:")
run_status.resume_refused()
pages = -(-len(everything) // run_list.PER_PAGE)
st.caption(f"{len(everything)} {'run' if len(everything) == 1 else 'runs'}, newest first.")
key = url_state.linked("page", 1, url_state.within(1, pages, int))
page = st.pagination(pages, key=key) if pages > 1 else 1
for run in everything[(page - 1) * run_list.PER_PAGE : page * run_list.PER_PAGE]:
    run_list.row(run, more=True)
