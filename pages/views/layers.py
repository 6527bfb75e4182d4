"""Layers: the stack before and after, with each layer's weight, fate and size."""

import streamlit as st

from pages.ui.app_state import server, session, url_state
from pages.ui.charts import drawing, stack_pictures
from pages.ui.run import importance, run_list, run_status
from pages.ui.style import theme, words
from pages.ui.what_if import panel
from trsp_core.charts import frames

url_state.title("Layers")
run = run_list.choose(server.runs(), "pages/views/layers.py")
config = run_status.config_of(run) if run else None
if run is None or config is None:
    st.stop()

state, status = server.look(run)
run_status.title(run, config, state, status)
st.page_link("pages/views/run.py", label="Back to this run", icon=":material/arrow_back:", query_params={"run": run.id})
if state.model is None:
    st.info(
        "This run has loaded no model, so it has no layers to show. Open the run to see why.", icon=":material/info:"
    )
    st.stop()

names = ["Before and after", "Try it yourself", "Where the knowledge went"]
first = names[1] if session.set_in_address() else names[0]
part = url_state.linked("layers-part", first, url_state.one_of(names))
stacks, trying, moved = st.tabs(names, key=part, on_change="rerun")
if stacks.open:
    with stacks:
        depth, stay = state.model.n_layers, frames.fates(state).count("kept")
        picture, table = st.columns([5, 4], gap="large")
        with picture:
            if state.narrowed:
                said = f"**All {depth} layers stay, and each got narrower:** {state.narrowed.told}."
                st.markdown(f"{said} Left before; right after, as wide as its parameters are many.")
            else:
                st.markdown(
                    f"**{stay} of {depth} layers stay.** Left before, with weights; right after, with new places."
                )
            description = f"Two stacks: {depth} layers before, {stay} after. Chosen: {words.layers(state.chosen)}."
            spec = stack_pictures.stacks(theme.mode(), depth)
            drawing.show(spec, stack_pictures.before_after(state), "stacks", description)
            st.caption(stack_pictures.caption(state))
        with table:
            frame = frames.layer_table(state)
            alt = "Each layer's weight, fate and size."
            two = st.column_config.NumberColumn(format="%.2f", width="small")
            columns = {"Layer": st.column_config.NumberColumn(width="small"), **dict.fromkeys(frame.columns[2:], two)}
            height = min(35 * (len(frame) + 1) + 3, 1100)  # pixels
            st.dataframe(frame, hide_index=True, height=height, placeholder="–", alt=alt, column_config=columns)
if trying.open:
    with trying:
        panel.section(run, config, state)
if moved.open:
    with moved:
        importance.section(config, state)
