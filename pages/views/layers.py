"""Layers: the stack before and after, with each layer's weight, fate and size."""

import streamlit as st

from pages.ui import charts, lists, panels, pictures, series, server, theme, words

st.title("Layers")
run = lists.choose(server.store().runs())
config = panels.config_of(run) if run else None
if run is None or config is None:
    st.stop()

state, status = server.look(run)
panels.title(run, config, state, status)
st.page_link("pages/views/run.py", label="Back to this run", icon=":material/arrow_back:", query_params={"run": run.id})
if state.model is None:
    st.info(
        "This run has not loaded its model, so there are no layers to show yet. Come back when it has.",
        icon=":material/info:",
    )
    st.stop()

picture, table = st.columns([3, 2], gap="large")
with picture:
    left, right = st.columns(2)
    left.markdown("**Before**, layer and weight")
    right.markdown("**After**, new place" if state.removed else "**After**, as chosen so far")
    fates = series.fates(state)
    description = f"Two stacks: {state.model.n_layers} layers before, {fates.count('kept')} after. Chosen: {words.layers(state.chosen)}."
    charts.show(
        pictures.stacks(theme.mode(), state.model.n_layers), pictures.before_after(state), "chart-stacks", description
    )
    st.caption(
        "The input is at the bottom. A weight near 1 says that the text needs the layer; near 0, that it does not."
    )
with table:
    frame = series.layer_table(state)
    st.markdown(f"**{fates.count('kept')} of {state.model.n_layers} layers stay**")
    st.dataframe(
        frame, hide_index=True, height=min(36 * (len(frame) + 1), 1100), alt="Each layer's weight, fate and size."
    )
