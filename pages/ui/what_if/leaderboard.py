"""Who is ahead after stage 2: runs that differ in the layers alone, compared on the same blocks."""

from __future__ import annotations

import streamlit as st

from pages.ui.app_state import server
from pages.ui.what_if import history, rivals
from pages.ui.what_if.rivals import Rival
from trsp_core.errors import TrspError
from trsp_core.runs.store import Run
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState

MOST = 8  # runs beside this one


def section(run: Run, config: RunConfig, state: RunState) -> None:
    """The table and its sentence; nothing while there is no rival."""
    field = competitors(run, config, state)
    if len(field) < 2:
        return
    st.markdown("#### After stage 2")
    if verdict := rivals.verdict(field, len(state.chosen)):
        st.markdown(verdict)
    st.caption(
        "Finished runs with the same texts, stage 2 settings and seed as this one, as deep first, best first, on all "
        "measured blocks."
    )
    columns = {"Run": st.column_config.LinkColumn(display_text="Open")}
    alt = "Runs that differ in the removed layers, with the perplexities of their pruned models."
    looks = {name: look for name, look in history.LOOKS.items() if name != "KL held out"}
    frame = rivals.table(field).style.format(looks, na_rep="–")
    st.dataframe(frame, hide_index=True, key="rivals", alt=alt, column_config=columns)


def competitors(run: Run, config: RunConfig, state: RunState) -> list[Rival]:
    """This run and the newest others that differ from it in the layers alone: as deep first, best first."""
    others = [(other, _config(other)) for other in server.runs() if other.id != run.id]
    near = [(other, settings) for other, settings in others if settings and rivals.alike(config, settings)][:MOST]
    field = [rivals.rival(run, config, state)]
    field += [rivals.rival(other, settings, server.look(other)[0], state) for other, settings in near]
    depth = len(state.chosen)
    return sorted((r for r in field if r), key=lambda r: (abs(len(r.removed) - depth), len(r.removed), r.times))


def _config(run: Run) -> RunConfig | None:
    try:
        return run.config()
    except TrspError:
        return None
