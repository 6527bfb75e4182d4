"""A lesson of one's own: read from a file, checked, begun, and turned into a link for a class."""

from __future__ import annotations

import urllib.parse

import streamlit as st

from pages.ui.app_state import session
from pages.ui.style import words
from pages.ui.tour import guide, lessons
from pages.ui.tour.classroom import LADDERS
from pages.ui.tour.lessons import Lesson
from trsp_core.errors import TrspError


def area() -> None:
    """Lessons for a class, and loading one from a file; folded away."""
    with st.expander("Lessons for a class, and your own", icon=":material/school:", key="own-lessons"):
        with st.container(horizontal=True):
            for name in LADDERS:
                lesson = lessons.shipped()[name]
                label = f"{words.plain(lesson.title)}, {lesson.minutes:g} min"
                if st.button(label, key=f"begin-{name}", icon=":material/play_lesson:"):
                    guide.start(name)
        st.markdown("A lesson is a JSON file: a title, minutes, and steps, each with a page, a text, and settings.")
        example = lessons.to_json(lessons.shipped()[LADDERS[0]])
        st.download_button(
            "An example to change", example, "lesson.json", "application/json", icon=":material/download:"
        )
        st.file_uploader("Load a lesson, a JSON file", type=["json"], max_upload_size=1, key="lesson-file")
        brought = session.get("lesson-file")
        if brought is not None:
            _brought(brought.getvalue())


def _brought(content: bytes) -> None:
    """What was loaded: all that is wrong with it, or its steps with what can be done with them."""
    try:
        lesson = lessons.load(content)
    except TrspError as error:
        told = [f"- {words.plain(p.message)} {words.plain(p.remedy)}" for p in error.problems]
        alone = f"{words.plain(error.message)} {words.plain(error.remedy)}"
        st.error("\n".join(["This lesson needs a change:\n", *told]) if told else alone, icon=":material/error:")
        return
    titles = ". ".join(f"{n} {words.plain(step.title)}" for n, step in enumerate(lesson.steps, 1))
    st.markdown(f"**{words.plain(lesson.title)}**, {lesson.minutes:g} min. {titles}.")
    if st.button("Begin this lesson", type="primary", icon=":material/play_lesson:", key="begin-own"):
        guide.begin(lesson)
    _link(lesson)


def _link(lesson: Lesson) -> None:
    """The lesson within a link, where it fits."""
    try:
        word = lessons.pack(lesson)
    except TrspError as error:
        st.caption(f"{words.plain(error.message)} {words.plain(error.remedy)}")
        return
    st.caption("Whoever opens this link is led through the lesson; it holds the lesson itself.")
    st.code(f"{st.context.url or ''}?{urllib.parse.urlencode({'lesson': word})}", language=None, wrap_lines=True)
