"""The workbench as pages see it: one for all tabs, how a request stands, and what it waits for."""

from __future__ import annotations

import streamlit as st

from pages.ui.app_state import server
from pages.ui.style import words
from trsp_core.errors import TrspError
from trsp_core.schema import messages as an
from trsp_core.workbench.client import Reading, Workbench


@st.cache_resource(show_spinner=False, on_release=lambda workbench: workbench.close())
def client() -> Workbench:
    """The one workbench; its process starts with the first request."""
    return Workbench()


def answers(ticket: str, wait: float = 0.0) -> Reading | None:
    """What has been answered to the request with `ticket`, after up to `wait` seconds for more of it; None where its
    answers are no longer kept."""
    try:
        first = client().read(ticket)
        return client().follow(ticket, len(first.answers), wait) if wait and not first.ending else first
    except TrspError:
        return None


def waiting(reading: Reading) -> str:
    """What a request waits for: a sentence; "" once there are answers."""
    second = " A run is training on this machine and goes first." if server.run_queue().goes_first() else ""
    if reading.place:
        ahead = "next" if reading.place == 1 else f"place {reading.place} in the queue"
        return f"The workbench is busy with another request: this one is {ahead}.{second}"
    if reading.ending is None and not reading.answers:
        return f"The workbench is getting the models ready; the first time takes some seconds.{second}"
    return ""


def standing(reading: Reading) -> None:
    """Where a request is: what it waits for, or how it ended badly."""
    if why := waiting(reading):
        st.info(why, icon=":material/hourglass_top:")
    ended_badly(reading)


def ended_badly(reading: Reading) -> None:
    """Show why a request was refused, stopped or broke off; nothing where it was not."""
    ending = reading.ending
    if isinstance(ending, an.Broken):
        st.error(f"{words.plain(ending.message)} {words.plain(ending.remedy)}", icon=":material/error:")
    elif isinstance(ending, an.Refused):
        st.warning(f"{words.plain(ending.message)} {words.plain(ending.remedy)}", icon=":material/block:")
    elif isinstance(ending, an.Stopped):
        st.caption(":material/stop_circle: Stopped. What was written until then stays.")
