"""Layers: take layers out by hand and see what that costs; of a run, the stack before and after."""

import streamlit as st

from pages.ui.app_state import session, url_state
from pages.ui.charts import drawing, stack_pictures
from pages.ui.run import importance, model_picker, run_list, start, subjects
from pages.ui.run.subjects import Subject
from pages.ui.style import theme, words
from pages.ui.what_if import panel
from trsp_core import formatting
from trsp_core.charts import frames

PARTS = ["Before and after", "Try it yourself", "Where the knowledge went"]


def before_and_after(subject: Subject) -> None:
    """Both stacks, and a table of all layers."""
    state, depth, stay = subject.state, subject.depth, frames.fates(subject.state).count("kept")
    picture, table = st.columns([5, 4], gap="large")
    with picture:
        if state.narrowed:
            sentence = f"**All {depth} layers stay, and each got narrower:** {state.narrowed.sentence}."
            st.markdown(f"{sentence} Left before; right after, as wide as its parameters are many.")
        else:
            st.markdown(f"**{stay} of {depth} layers stay.** Left before, with weights; right after, with new places.")
        description = f"Two stacks: {depth} layers before, {stay} after. Chosen: {words.layers(state.chosen)}."
        spec = stack_pictures.stacks(theme.mode(), depth)
        drawing.show(spec, stack_pictures.before_after(state), "stacks", description)
        st.caption(stack_pictures.caption(state))
    with table:
        frame = frames.layer_table(state)
        alt = "Each layer's weight, fate and size."
        two = st.column_config.NumberColumn(format=formatting.C_FIGURE, width="small")
        columns = {"Layer": st.column_config.NumberColumn(width="small"), **dict.fromkeys(frame.columns[2:], two)}
        height = min(35 * (len(frame) + 1) + 3, 1100)  # pixels
        st.dataframe(frame, hide_index=True, height=height, placeholder="–", alt=alt, column_config=columns)


def of_run(subject: Subject) -> None:
    """The three parts of a run's layers."""
    first = PARTS[1] if session.set_in_address() else PARTS[0]
    part = url_state.linked("layers-part", first, url_state.one_of(PARTS))
    stacks_tab, trial_tab, importance_tab = st.tabs(PARTS, key=part, on_change="rerun")
    if stacks_tab.open:
        with stacks_tab:
            before_and_after(subject)
    if trial_tab.open:
        with trial_tab:
            panel.section(subject)
    if importance_tab.open:
        with importance_tab:
            importance.section(subject)


url_state.title("Layers")
subject = subjects.choose()
if subject is None:
    st.stop()
subjects.title(subject)
if subject.run is None:
    if start.fetchable(subject.config.model):
        model_picker.box(subject.config.model)
    panel.section(subject)
    run_list.recorded("pages/views/layers.py")
    st.stop()
back = {"run": subject.run.id}
st.page_link("pages/views/run.py", label="Back to this run", icon=":material/arrow_back:", query_params=back)
if subject.state.model is None:
    st.info(
        "This run has loaded no model, so it has no layers to show. Open the run to see why.", icon=":material/info:"
    )
    st.stop()
of_run(subject)
