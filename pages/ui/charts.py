"""Charts on a page: the specs of `trsp_core.drawings`, drawn and updated in place."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from trsp_core.drawings import (
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
    stack,
    weights,
)

__all__ = [
    "ALT", "BOXES", "HEIGHT", "LINES", "Spec", "fate_colour", "finish", "gaps", "losses", "probes", "scores", "show",
    "stack", "weights",
]  # fmt: skip


def show(spec: Spec, frame: pd.DataFrame, name: str, description: str = "") -> None:
    """Draw `frame`; under the same name it is updated in place. `description`: of a chart that `ALT` does not hold."""
    st.vega_lite_chart(frame, spec, key=f"chart-{name}", alt=description or ALT[name], width="stretch")
