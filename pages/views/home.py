"""Home: what this is, the two stages in pictures, and where to start."""

import streamlit as st

from pages.ui import charts, fetching, lists, pictures, planner, theme
from trsp_core.config import KNOBS

STAGES = {
    "find": (
        "Stage 1: find",
        "Every layer gets a weight, 1 at first. Training pulls all weights down; those that the text needs hold out. "
        "The smallest goes first.",
    ),
    "move": (
        "Stage 2: move",
        "The chosen layers are taught to change nothing, while the layers around them take over what they knew.",
    ),
    "delete": (
        "Then delete",
        "The chosen layers are removed for real. What is left is an ordinary checkpoint: smaller, and faster.",
    ),
}

st.title("Prune a language model while you watch")
st.markdown(
    "A language model is a stack of layers, and some of them matter less than others. "
    "TRSP finds those layers, teaches the rest of the model to do without them, and deletes them. "
    "Here this happens to a real model on real text before your eyes, and every figure is measured, good or bad."
)

with st.container(horizontal=True, vertical_alignment="center"):
    if st.button("Start a run", type="primary", icon=":material/play_arrow:", key="go"):
        st.switch_page("pages/views/run.py")
    st.page_link("pages/views/runs.py", label="All runs", icon=":material/list:")

default = KNOBS["model"].default
if planner.fetchable(default):
    fetching.box(default)

for column, (name, (title, text)) in zip(st.columns(3, gap="large"), STAGES.items(), strict=True):
    with column:
        st.subheader(title)
        charts.show(
            pictures.schematic(theme.mode()), pictures.stage(name), f"picture-{name}", f"A stack of ten layers. {text}"
        )
        st.markdown(text)

st.subheader("Latest runs")
lists.latest(4)
