"""Home: a recorded run that plays at once, what it shows in words, and where to go from there."""

import streamlit as st

from pages.ui import fetching, lists, planner, player
from trsp_core.config import KNOBS

STAGES = {
    "Find": (
        "Every layer gets a weight, 1 at first. Training pulls all weights down; those that the text needs hold out. "
        "The smallest goes first."
    ),
    "Move": "The chosen layers are taught to change nothing, while the layers around them take over what they knew.",
    "Delete": (
        "The chosen layers are removed for real. What is left is an ordinary checkpoint: smaller, and faster. "
        "Every figure is measured, good or bad."
    ),
}

st.header("Prune a language model while you watch")
run, config = player.wanted()
player.area(run, config)

with st.container(horizontal=True, vertical_alignment="center"):
    if st.button("Start a run", type="primary", icon=":material/play_arrow:", key="go"):
        st.switch_page("pages/views/run.py")
    st.page_link("pages/views/runs.py", label="All runs", icon=":material/list:")

default = KNOBS["model"].default
if planner.fetchable(default):
    fetching.box(default)

for column, (number, (title, text)) in zip(st.columns(3, gap="large"), enumerate(STAGES.items(), 1), strict=True):
    with column:
        st.subheader(f"{number}  {title}")
        st.markdown(text)

st.subheader("Latest runs")
lists.latest(4)
