"""The guide: walks a lesson across the pages. While one is on, a bar at the bottom of every page has its step.

Which lesson and which step stand in the address, so that a refresh, a change of page and a shared link keep them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.style import words
from pages.ui.style.theme import mode
from pages.ui.tour import glossary, lessons
from pages.ui.tour.lessons import Lesson, Step
from pages.ui.what_if import requests
from trsp_core.charts.palette import PALETTES
from trsp_core.errors import TrspError
from trsp_core.runs import replay
from trsp_core.runs.store import Run

OWN = "own"  # in the address for a lesson too long for a link: it lasts as long as its tab
TRY, TRY_PART = "layers-part", "Try it yourself"
STYLE = (  # the line above the bar fills up as the lesson goes on
    ".st-key-guide {{gap:0.4rem}} .st-key-guide-text {{max-height:24vh;overflow:auto}}"
    "[data-testid=stBottom] > div {{border-top:4px solid;"
    "border-image:linear-gradient(to right, {done} {share:.0%}, {rest} {share:.0%}) 1}}"
    "[data-testid=stBottomBlockContainer] {{padding-top:0.5rem;padding-bottom:0.8rem}}"
    "@media (max-width:640px) {{.st-key-guide :has(> .st-key-guide-title) {{min-width:100%}}"
    ".st-key-guide button {{padding:0.2rem 0.5rem}}}}"
)


def bar(page: str) -> None:
    """The bar of this tab's lesson, if it is in one; `page` is the page that is shown, as a lesson names it."""
    position = current()
    if position is None:
        return
    word, lesson, n = position
    step, count = lesson.steps[n], len(lesson.steps)
    with st.bottom, st.container(key="guide"):
        colours = PALETTES[mode()]
        style = STYLE.format(done=colours.kept, rest=colours.faint, share=(n + 1) / count)
        st.html(f"<style>{style}</style>")
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            with st.container(key="guide-title"):
                st.markdown(f":gray[{n + 1} of {count}]  **{words.plain(step.title)}**")
            if step.page != page:
                label = f"Go to {step.page.capitalize()}"
                if st.button(label, key="guide-here", icon=":material/login:", type="primary"):
                    go(word, lesson, n)
            if st.button("Back", key="guide-back", icon=":material/arrow_back:", disabled=n == 0):
                go(word, lesson, n - 1)
            last = n + 1 == count
            kind = "primary" if step.page == page else "secondary"
            if last:
                st.button("Finish", key="guide-next", type=kind, icon=":material/check:", on_click=session.leave_lesson)
            elif st.button("Next", key="guide-next", type=kind, icon=":material/arrow_forward:", icon_position="right"):
                go(word, lesson, n + 1)
            glossary.button("guide-words")
            st.button(
                "Leave", key="guide-leave", icon=":material/close:", type="tertiary", on_click=session.leave_lesson
            )
        with st.container(key="guide-text"):
            more = f" :gray[Look at: {words.plain(step.look_at)}.]" if step.look_at else ""
            st.markdown(words.plain(step.text) + more)


def current() -> tuple[str, Lesson, int] | None:
    """The lesson in the address, or else the one that this tab is in: its word there, itself, and its step from 0. One
    that cannot be read is left, with a warning."""
    word, n = session.lesson()
    if not word:
        return None
    try:
        lesson = _find(word)
    except TrspError as error:
        session.leave_lesson()
        st.warning(f"{words.plain(error.message)} {words.plain(error.remedy)}", icon=":material/link_off:")
        return None
    if n is None:  # a link to the lesson as a whole
        go(word, lesson, 0)
    n = min(max(n or 0, 0), len(lesson.steps) - 1)
    session.show_lesson(word, n)
    return word, lesson, n


def begin(lesson: Lesson) -> None:
    """Start `lesson`, one that does not ship with the app; its link is tried first, so that a refresh finds it."""
    try:
        word = lessons.pack(lesson)
    except TrspError:
        word = OWN
        session.put("own-lesson", lesson)
    go(word, lesson, 0)


def start(name: str) -> None:
    """Start a lesson that ships with the app."""
    go(name, lessons.shipped()[name], 0)


def go(word: str, lesson: Lesson, n: int) -> None:
    """Go to step `n` of the lesson: its page, with its settings."""
    session.show_lesson(word, n)
    visit(lesson.steps[n], {"lesson": word, "step": str(n + 1)})


def visit(step: Step, more: dict[str, str] | None = None) -> None:
    """Open the step's page with its settings; `more` goes into the address besides."""
    query = dict(more or {})
    if step.page == "run" and step.settings:
        session.leave_run()
        values = step.form()
        session.fill({k: v for k, v in values.items() if k in step.settings or k not in session.KEPT_BY_PRESETS})
    elif step.page == "run" and session.get("run"):
        query["run"] = session.get("run")
    elif step.page in ("layers", "compare"):
        run = _run()
        query["run"] = run.id
        if step.settings.get("layers"):
            query["off"] = str(step.settings["layers"])
            session.put(TRY, TRY_PART)
            requests.forget(run.id)
    if step.page == "compare" and step.prompt:
        session.put("compare-prompt", step.prompt)
    st.switch_page(f"pages/views/{step.page}.py", query_params=query)


def _run() -> Run:
    """The run that this tab looks at; the recorded one where it looks at none."""
    with contextlib.suppress(TrspError):  # it was deleted meanwhile
        return server.get_run(session.get("run") or replay.RECORDED)
    return server.get_run(replay.RECORDED)


def experiments(steps: Sequence[Step], key: str) -> None:
    """Experiments in boxes, each with a button that sets the knobs and opens the page."""
    for start in range(0, len(steps), 3):
        for n, (column, step) in enumerate(zip(st.columns(3), steps[start : start + 3], strict=False), start):
            with column, st.container(border=True, height="stretch", key=f"{key}-{n}"):
                st.markdown(f"**{words.plain(step.title)}**")
                st.markdown(words.plain(step.text))
                label = f"Set it up on {step.page.capitalize()}"
                if st.button(label, key=f"{key}-go-{n}", icon=":material/arrow_forward:"):
                    visit(step)


def _find(word: str) -> Lesson:
    if word != OWN:
        return lessons.find(word)
    if lesson := session.get("own-lesson"):
        return lesson
    raise TrspError("This lesson came from a file, and the page was loaded anew.", "Load the file again.")
