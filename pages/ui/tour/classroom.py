"""Settings for a class: a ladder of runs that a teacher fills the form with, one rung a click. The rungs are those of
the lessons that ship with the app."""

from __future__ import annotations

import streamlit as st

from pages.ui.app_state import session
from pages.ui.run import form
from pages.ui.style import words
from pages.ui.tour import lessons
from pages.ui.tour.lessons import Step

LADDERS = ("ratio-ladder", "lambda-1", "literal-gate")


def presets() -> None:
    """One click for a whole setting, and beside it a class's settings."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="presets"):
        form.presets()
        ladders()


def ladders() -> None:
    """The ladders, folded away."""
    with st.popover("For a class", icon=":material/school:", help="Settings to run one after the other."):
        st.caption(
            "A click fills the form. Press Start for each: runs wait in the queue, and Runs lists them together."
        )
        for name in LADDERS:
            lesson = lessons.shipped()[name]
            st.markdown(f"**{words.plain(lesson.title)}**")
            with st.container(horizontal=True, gap="xsmall"):
                for n, step in enumerate(lesson.steps):
                    if step.page == "run":
                        title = words.plain(step.title)
                        st.button(
                            title, key=f"class-{name}-{n}", help=words.plain(step.text), on_click=_fill, args=(step,)
                        )


def _fill(step: Step) -> None:
    """A callback: the form as the step wants it; model, texts, seed and machine stay."""
    wanted = step.form()
    session.fill({k: v for k, v in wanted.items() if k in step.settings or k not in session.KEPT_BY_PRESETS})
