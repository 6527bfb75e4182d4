"""Home: a recorded run that plays at once, the tours, and where to go from there."""

import streamlit as st

from pages.ui.run import model_picker, run_list, start
from pages.ui.tour import custom_lessons, glossary, guide, lessons, player
from trsp_core.schema.config import KNOBS

TOURS = ("two-minutes", "twenty-minutes")
REPAIR = (
    "The chosen layers stop. From below, each layer that stays is solved to hand on what the whole model had there; "
    "then all may train together for some steps."
)
STAGES = {
    "Find": (
        "Every layer gets a weight, 1 at first. Training pulls all weights down; those that the text needs hold out. "
        "Each round takes the smallest of those left, or of the few smallest the one that is missed least."
    ),
    "Move": "The chosen layers are taught to change nothing, while the layers around them take over what they knew.",
    "Delete": (
        "The chosen layers are removed for real. What is left is an ordinary checkpoint: smaller, and faster. "
        "Every figure is measured, good or bad."
    ),
}

touring = guide.current() is not None
if not touring:
    with st.container(horizontal=True, vertical_alignment="center", key="home-title"):
        st.header("Prune a language model while you watch", width="stretch")
        for name in TOURS:
            if st.button(lessons.shipped()[name].title, icon=":material/tour:", key=f"tour-{name}"):
                guide.start(name)
        if st.button("Start a run", type="primary", icon=":material/play_arrow:", key="go"):
            st.switch_page("pages/views/run.py")
run, config = player.run_to_replay()
player.area(run, config)

default = str(KNOBS["model"].default)
if start.fetchable(default):
    model_picker.box(default)

texts = STAGES | ({"Move": REPAIR} if config.repairs else {})
for column, (number, (title, text)) in zip(st.columns(3, gap="large"), enumerate(texts.items(), 1), strict=True):
    with column:
        st.subheader(f"{number}  {title}")
        st.markdown(text)
glossary.button("home-words")

st.subheader("Experiments to try")
guide.experiments(lessons.shipped()["experiments"].steps, "experiment")
custom_lessons.area()

st.subheader("Latest runs")
run_list.latest(4)
st.page_link("pages/views/runs.py", label="All runs", icon=":material/list:")
