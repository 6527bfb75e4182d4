"""The workbench as pages see it: one for all tabs, how a request stands, and what it waits for."""

from __future__ import annotations

import os

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.style import words
from trsp_core.errors import TrspError
from trsp_core.models.catalog import Facts
from trsp_core.schema import messages as an
from trsp_core.workbench.client import Reading, Workbench

LIGHT = 1_000_000_000  # parameters of a model that is loaded before anybody asks for something of it


@st.cache_resource(show_spinner=False, on_release=lambda workbench: workbench.close())
def client() -> Workbench:
    """The one workbench; its process starts with the first request."""
    return Workbench()


def ask(request: an.Request, instead: str = "") -> str:
    """Ask on behalf of this tab: whatever nobody listens for any more is dropped. Raises TrspError as
    `Workbench.ask`."""
    return client().ask(request, instead, session.visitor(), session.listening())


def prepare(request: an.Prepare) -> None:
    """Have the model loaded in the workbench's process, if it is here and no large one; returns at once."""
    facts = server.facts(request.model)
    if isinstance(facts, Facts) and facts.parameters <= LIGHT:
        client().prepare(request)


def answers(ticket: str, wait: float = 0.0) -> Reading | None:
    """What has been answered to the request with `ticket`, after up to `wait` seconds for more of it; None where its
    answers are no longer kept."""
    try:
        first = client().read(ticket)
        return client().follow(ticket, len(first.answers), wait) if wait and not first.ending else first
    except TrspError:
        return None


def waiting(reading: Reading) -> str:
    """What a request waits for, and why: a sentence or two; "" once there are answers."""
    if reading.place and reading.others:
        first = f"{'A question' if reading.others == 1 else f'{reading.others} questions'} of other visitors"
        return f"{first} {'comes' if reading.others == 1 else 'come'} first.{_slowed()}"
    if reading.place:
        return f"This comes next: {_task(reading.at_work)}.{_slowed()}"
    if reading.ending is None and not reading.answers:
        return f"The model is being made ready, which takes some seconds the first time.{_slowed()}"
    return ""


def _task(request: an.Request | None) -> str:
    """What the workbench is at, as the beginning of a sentence that gives a cause."""
    match request:
        case an.Generate() | an.Trace():
            return "a text is being written before it"
        case an.Prepare():
            return "the model is being loaded"
        case _:
            return "the layers asked for before are being measured"


def _slowed() -> str:
    """Why it takes longer now than at other times: a sentence, with a space before it."""
    queue = server.run_queue()
    if queue.goes_first():
        return f" A run is using {_cores()} and goes first."
    return f" It takes longer, since a run is using {_cores()}." if queue.children else ""


def _cores() -> str:
    count = os.cpu_count() or 1
    return {1: "the only core", 2: "both cores"}.get(count, f"all {count} cores")


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
