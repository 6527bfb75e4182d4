"""Charts on a page: the specs of `trsp_core.charts.specs`, drawn and updated in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pandas as pd
import pyarrow as pa
import streamlit as st

from trsp_core.charts.specs import (
    ALT,
    BOXES,
    HEIGHT,
    LINES,
    Spec,
    fate_colour,
    finish,
    gaps,
    losses,
    probes,
    scores,
    set_apart,
    stack,
    weights,
)
from trsp_core.schema.run_state import RunState

__all__ = [
    "ALT", "BOXES", "HEIGHT", "LINES", "Spec", "fate_colour", "finish", "gaps", "losses", "of_run", "probes", "scores",
    "set_apart", "show", "stack", "weights",
]  # fmt: skip


_recent: OrderedDict[tuple[int, str], tuple[RunState, pa.Table]] = OrderedDict()  # by id of the state, and chart
RECENT = 60


def of_run(spec: Spec, state: RunState, rows: Callable[[], pd.DataFrame], name: str) -> None:
    """A chart of a run's `state`; many may watch one run, so `rows` is called once for all who look at that state."""
    key = (id(state), name)
    known = _recent.get(key)  # which holds the state, so that no other one gets its id
    table = known[1] if known else pa.Table.from_pandas(rows())
    if not known:
        _recent[key] = (state, table)
        while len(_recent) > RECENT:
            _recent.popitem(last=False)
    show(spec, table, name)


def show(spec: Spec, frame: pd.DataFrame | pa.Table, name: str, description: str = "") -> None:
    """Draw `frame`; under the same name it is updated in place. `description`: of a chart that `ALT` does not hold."""
    st.vega_lite_chart(frame, spec, key=f"chart-{name}", alt=description or ALT[name], width="stretch")
