"""What the models of the recorded run wrote after the ready prompts: shown at once, and written again as it was."""

from __future__ import annotations

import time
from pathlib import Path

import streamlit as st

from pages.ui.app_state import session
from pages.ui.compare import generation_form, side_by_side
from pages.ui.run import subjects
from pages.ui.run.subjects import Subject
from trsp_core.runs import replay
from trsp_core.runs.store import Run
from trsp_core.schema.messages import Answer, Generate
from trsp_core.workbench import transcript

BEGUN = "recorded-texts-begun"  # when this tab has the texts written again, by the clock of `time.monotonic`
BEAT = 0.25  # seconds between two looks at them


@st.cache_resource(show_spinner=False, max_entries=2)
def _texts(folder: str, changed: float) -> dict[str, tuple[Generate, list[Answer]]]:
    """Requests and answers of the recorded run, by their prompt."""
    run = Run(Path(folder))
    pairs = [transcript.read(run, name) for name in transcript.comparisons(run)]
    return {request.prompt: (request, answers) for request, answers in pairs}


def find(prompt: str) -> tuple[Generate, list[Answer]] | None:
    """What was recorded after `prompt`; None where nothing was."""
    folder = replay.FOLDER / "comparisons"
    return _texts(str(replay.FOLDER), folder.stat().st_mtime).get(prompt) if folder.is_dir() else None


def show(subject: Subject) -> bool:
    """The recorded texts after the prompt of the form, if `subject` is what the recorded run began with, and they are
    there; whether they were."""
    texts = find(session.get("compare-prompt") or "") if subject.is_recorded else None
    if texts is None:
        return False
    began = session.get(BEGUN)
    st.fragment(_draw, run_every=BEAT if began else None)(*texts, began)
    return True


def _draw(request: Generate, answers: list[Answer], began: float | None) -> None:
    """All of it, or what had been written after the time since `began`."""
    moment = time.monotonic() - began if began else None
    so_far = transcript.until(answers, moment) if moment is not None else answers
    if moment is not None and len(so_far) == len(answers):
        session.put(BEGUN, None)
        st.rerun()
    layers = len(subjects.shipped().state.chosen)
    with st.container(horizontal=True, vertical_alignment="center", key="recorded-texts"):
        st.caption(
            f":material/history: **Recorded**: what the dense model, the one without {layers} layers, and the pruned "
            "one of the run on Home wrote after this prompt, likeliest tokens. “Write” asks the models anew.",
            width="stretch",
        )
        st.button("Replay", icon=":material/replay:", key="replay-texts", on_click=_begin, disabled=bool(began))
    comparison = transcript.gather(request, so_far)
    side_by_side.texts(comparison, live=moment is not None)
    if moment is None:
        side_by_side.reading_along(comparison)
        generation_form.copy(comparison)


def _begin() -> None:
    """A callback: write the texts again from now on."""
    session.put(BEGUN, time.monotonic())
