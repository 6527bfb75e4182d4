"""Running a plan from its page: how many of its runs are here, a button for the missing ones, progress, and Stop."""

from __future__ import annotations

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.style import words
from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.experiments.plan_queue import PlanStatus

PERIOD = 2.0  # seconds between looks while a plan is at work


def panel(plan: str) -> None:
    """Button, progress and command of a built-in plan; drawn again by itself while it is at work."""
    with st.container(border=True, key=f"plan-{plan}"):
        now = server.plan_queue().standing(plan)
        st.fragment(_draw, run_every=PERIOD if now.active else None)(plan, now.active, now.done)
        st.caption("The same from a shell; a stopped plan goes on where it was:")
        st.code(f"python -m trsp_core compare --plan {plan}", language="bash")


def _draw(plan: str, active: bool, done: int) -> None:
    now = server.plan_queue().standing(plan)
    if (now.active, now.done) != (active, done):
        st.rerun()  # the pictures above have something new to show
    trouble = session.get(f"trouble-{plan}") or now.trouble
    if trouble and not now.active:
        st.error(words.plain(str(trouble)), icon=":material/error:")
    if now.active:
        _progress(plan, now)
    elif now.done == now.total:
        st.markdown(f":material/check_circle: All {now.total} runs of this plan are on this machine.")
    else:
        _offer(plan, now)


def _offer(plan: str, now: PlanStatus) -> None:
    missing = now.total - now.done
    label = f"Run all {now.total}" if not now.done else f"Run the {missing} that are missing" if missing > 1 else ""
    time = f"; the others take about {formatting.duration(now.seconds_left)}" if now.seconds_left else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            label or "Run the one that is missing",
            icon=":material/play_arrow:",
            key=f"run-plan-{plan}",
            on_click=_start,
            args=(plan,),
        )
        st.markdown(f"{now.done} of {now.total} runs are on this machine{time}. They go on when this tab is closed.")


def _progress(plan: str, now: PlanStatus) -> None:
    remaining = f" · about {formatting.duration(now.seconds_left)} left for all" if now.seconds_left else ""
    part = server.look(now.at_hand)[0].fraction if now.at_hand else 0.0
    st.progress((now.done + part) / now.total, text=f"{now.done} of {now.total} runs done{remaining}")
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Stop", icon=":material/stop:", key=f"stop-plan-{plan}", on_click=_stop, args=(plan,))
        if now.at_hand:
            st.page_link(
                "pages/views/run.py",
                label=f"At hand: {now.title}",
                icon=":material/open_in_full:",
                query_params={"run": now.at_hand.id},
            )
        else:
            st.caption("The next run is about to be queued.")


def _start(plan: str) -> None:
    """A callback; pressed twice it does nothing more."""
    session.put(f"trouble-{plan}", "")
    try:
        server.plan_queue().start(plan)
    except TrspError as error:
        session.put(f"trouble-{plan}", str(error))


def _stop(plan: str) -> None:
    """A callback."""
    try:
        server.plan_queue().stop(plan)
    except TrspError as error:  # the folder of runs cannot be written
        session.put(f"trouble-{plan}", str(error))
