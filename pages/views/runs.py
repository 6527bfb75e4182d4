"""Runs: every run on this machine, newest first; open one, stop it, delete it."""

import streamlit as st

from pages.ui import address, lists, panels, server, session, words

address.title("Runs")
everything = server.runs()
if not everything:
    st.info("No runs yet. A Quick run takes about three minutes on two cores.", icon=":material/info:")
    st.page_link("pages/views/run.py", label="Start a run", icon=":material/play_arrow:")
    st.stop()

if session.get("delete_error"):
    st.error(words.plain(session.get("delete_error")), icon=":material/error:")
panels.resume_refused()
pages = -(-len(everything) // lists.PER_PAGE)
st.caption(f"{len(everything)} {'run' if len(everything) == 1 else 'runs'}, newest first.")
key = address.linked("page", 1, address.within(1, pages, int))
page = st.pagination(pages, key=key) if pages > 1 else 1
for run in everything[(page - 1) * lists.PER_PAGE : page * lists.PER_PAGE]:
    lists.row(run, more=True)
