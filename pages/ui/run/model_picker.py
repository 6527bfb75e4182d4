"""Getting a model: looked up on the hub, its terms read, fetched at a click with progress; and the search for one."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.run.form import title_of
from pages.ui.style import words
from trsp_core import formatting, machine
from trsp_core.errors import TrspError
from trsp_core.models import catalog, download
from trsp_core.models.catalog import HubModel, SearchResult, Source
from trsp_core.preparation import forecast
from trsp_core.runs import limits
from trsp_core.schema.config import RunConfig


def box(name: str, config: RunConfig | None = None) -> None:
    """Say that the model is not here, what it is, and get it at a click; `config` is what it is wanted for."""
    with st.container(border=True, key="fetch"):
        st.markdown(f"**{words.plain(title_of(name))} is not on this machine yet.**")
        now = server.fetches().look(name)
        if now and now.running:
            st.fragment(_progress, run_every=1.0)(name)
            return
        if name in catalog.CATALOGUE:
            _offer_catalogued(catalog.CATALOGUE[name])
        else:
            _offer_from_hub(name, config or RunConfig(model=name))
        if now and now.refusal:
            _show_refusal(now.refusal)


def _progress(name: str) -> None:
    """How far the fetch is; drawn again each second."""
    now = server.fetches().look(name)
    if now is None or not now.running:
        st.rerun()
    st.progress(min(max(now.progress.fraction, 0.0), 1.0), text=words.plain(now.progress.message))
    label = "Stopping" if now.stopping else "Stop"
    st.button(label, disabled=now.stopping, key="fetch-stop", on_click=server.fetches().stop, args=(name,))


def _offer_catalogued(source: Source) -> None:
    st.caption(
        f"{source.note} Download {formatting.size(source.size_bytes)}, {formatting.size(source.ready_bytes)} on disk. "
        f"Licence: {source.licence}."
    )
    accepted = True
    if source.terms:
        st.markdown(f"It comes under the [{source.terms.title}]({source.terms.link}). {source.terms.summary}")
        accepted = st.checkbox("I have read these terms and accept them", key=f"terms-{source.name}")
    _button("Fetch the model", source.name, accepted)


def _offer_from_hub(hub_id: str, config: RunConfig) -> None:
    model = server.hub_model(hub_id)
    if isinstance(model, HubModel):
        _describe(model, config)
        _button(f"Download {formatting.size(model.bytes)}", hub_id)
        return
    if model:
        _show_refusal(model)
    else:
        st.caption("The hub is asked first for size, licence and form. No weights are downloaded by that.")
    icon = ":material/manage_search:"
    if st.button("Look it up", icon=icon, type="primary", key="look-up"):
        with st.spinner("Asking the hub"):
            server.look_up(hub_id)
        st.rerun()


def _describe(model: HubModel, config: RunConfig) -> None:
    """What it is, and whether this machine can hold it."""
    facts, free = model.facts, machine.available_memory()
    needed = forecast.peak_bytes(config, facts)
    gated = ", gated, and open to you" if model.gated else ""
    size = f"{facts.n_layers} layers, {formatting.parameters(facts.parameters)} parameters"
    st.markdown(
        f"{words.plain(facts.architecture)}, **{size}**, safetensors, download {formatting.size(model.bytes)}. "
        f"Licence: {words.plain(model.licence or 'not given')}{gated}."
    )
    fits = (
        f"A run with these settings needs about {formatting.size(needed)} of memory, {formatting.size(free)} are free."
    )
    if needed > free and not forecast.on_gpu(config):
        st.warning(f"{fits} It can be downloaded, but not pruned here now.", icon=":material/memory:")
    else:
        st.caption(fits)


def _button(label: str, name: str, accepted: bool = True) -> None:
    icon = ":material/download:"
    if st.button(label, icon=icon, type="primary", key="fetch-now", disabled=not accepted):
        server.fetches().start(name, accepted)
        st.rerun()


def _show_refusal(error: TrspError) -> None:
    st.error(f"{words.plain(error.message)}\n\n{words.plain(error.remedy)}", icon=":material/error:")


def choose() -> None:
    """The models of this machine, and a search for others on the hub; one is taken into the form at a click."""
    with st.popover("Find a model", icon=":material/search:"):
        st.markdown("**On this machine**")
        if not server.models_here():
            st.caption("None yet.")
        for facts in server.models_here().values():
            description = (
                f"{facts.n_layers} layers, {formatting.parameters(facts.parameters)} parameters, "
                f"{formatting.size(facts.bytes)}"
            )
            _row(facts.name, description)
        st.markdown("**On the model hub**")
        query = st.text_input("Words in its name, for example: smollm 360m", key="search-words", max_chars=100)
        if st.button("Search", key="search", disabled=not query.strip()):
            try:
                with st.spinner("Asking the hub"):
                    session.put("search-found", download.search(query, limits.current()))
            except TrspError as error:
                session.put("search-found", None)
                _show_refusal(error)
        _draw_found(session.get("search-found"))


def _draw_found(hits: Sequence[SearchResult] | None) -> None:
    if hits == []:
        st.caption("No model for text generation with safetensors has these words in its name.")
    for one in hits or ():
        size = f"{formatting.parameters(one.parameters)} parameters" if one.parameters else "size not given"
        licence = f"{one.licence or 'licence not given'}{', gated' if one.gated else ''}"
        _row(one.id, f"{size}, {licence}, {formatting.count(one.downloads or 0)} downloads")


def _row(name: str, description: str) -> None:
    """A model and the button that takes it into the form."""
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.markdown(f"{words.plain(title_of(name))}  \n:small[:gray[{words.plain(description)}]]")
        st.button("Take", key=f"take-{name}", on_click=session.fill, args=({"model": name},))
