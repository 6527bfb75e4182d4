"""What one server holds for all its tabs: the store, the queue of runs, and the watched runs, folded as they grow."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import itertools
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.runtime.pages_manager import PagesManager

from pages.ui.app_state import session
from trsp_core import malloc, paths
from trsp_core.errors import TrspError, refuse
from trsp_core.experiments.plan_queue import PlanQueue
from trsp_core.export.export_queue import ExportQueue
from trsp_core.models import catalog, download
from trsp_core.models.catalog import Facts, HubModel
from trsp_core.models.download import Downloads
from trsp_core.runs import limits, replay
from trsp_core.runs.queue import RunQueue
from trsp_core.runs.store import Run, Store
from trsp_core.schema.events import EventsMissing
from trsp_core.schema.run_state import RunState, fold


class Follower:
    """The state of one run, kept up to date. Each look reads only the bytes that were added since the last one. If
    the file was replaced, so that they do not continue what was read, all is read again: a look always gives what a
    replay of the file would."""

    def __init__(self, run: Run):
        self._run, self._offset, self._state = run, 0, RunState()
        self._snapshot: RunState | None = None
        self._lock = threading.Lock()

    def look(self) -> RunState:
        """The state now. It is the same object for all until events are added, and its lists never change later."""
        with self._lock:
            lines, offset = self._run.read(self._offset, self._state.count)
            if offset < self._offset or (self._offset and any(isinstance(e, EventsMissing) for _, _, e in lines)):
                self._state, self._snapshot = RunState(), None
                lines, offset = self._run.read()
            self._offset = offset
            if lines or self._snapshot is None:
                fold(self._state, lines)
                parts = {f.name: copy.copy(getattr(self._state, f.name)) for f in dataclasses.fields(RunState)}
                self._snapshot = RunState(**parts)
            return self._snapshot


@st.cache_resource(show_spinner=False)
def store() -> Store:
    return Store()


@st.cache_resource(show_spinner=False)
def run_queue() -> RunQueue:
    """The one queue; made at the first visit, it takes over what an earlier server left waiting."""
    return RunQueue(store())


@st.cache_resource(show_spinner=False)
def plan_queue() -> PlanQueue:
    """The plans that are worked through; it goes on with those that an earlier server left."""
    return PlanQueue(store(), run_queue())


@st.cache_resource(show_spinner=False)
def export_queue() -> ExportQueue:
    """The exports and reports of all tabs."""
    return ExportQueue(run_queue().limits)


@contextlib.asynccontextmanager
async def life(app: Any) -> AsyncIterator[None]:
    """What the server does at its start and at its end. On SIGTERM (a container goes down) its runs are stopped at a
    safe point, and the next server resumes them. After Ctrl-C they run on by themselves."""
    PagesManager.uses_pages_directory = False  # else the first visitor of a page by its address would be told of none
    malloc.hold_steady()
    plan_queue()  # with the queue; takes over what an earlier server left
    usual, stopping = (
        signal.getsignal(signal.SIGTERM),
        threading.Thread(target=run_queue().interrupt, name="last words"),
    )

    def on_terminate(number: int, frame: Any) -> None:
        if not stopping.ident:
            stopping.start()
        if callable(usual):
            usual(number, frame)

    signal.signal(signal.SIGTERM, on_terminate)
    yield
    if stopping.ident:
        await asyncio.to_thread(stopping.join)


@st.cache_resource(show_spinner=False, max_entries=12)
def _follower(folder: str, inode: int) -> Follower:
    """A long history takes some tens of MB: only the runs looked at last are held."""
    return Follower(Run(Path(folder)))


CROWD = 6  # tabs to a second between two redraws of each: what redraws take is taken from what they show
LONGEST_BEAT = 5.0
LAST = 9  # events that tell a run's pace
REDRAW = 0.15  # core-seconds that a redraw of a live page takes the machine whose browser shows it
SHARE = 0.025  # of this machine's cores that a browser on it may take from a run


@st.cache_resource(show_spinner=False)
def tabs() -> dict[str, float]:
    """When each tab that watches something last drew it, by the clock of `time.monotonic`."""
    return {}


def beat(state: RunState | None = None) -> float:
    """Seconds between two redraws, in this tab, of a page that watches something; more, the more tabs watch.

    For a page that watches the run of `state` it is at least the time from one of its events to the next, up to 3 s.
    If the browser is on this machine, it is so long that drawing takes only a small part of the cores.
    """
    last_drawn, now = tabs(), time.monotonic()
    last_drawn[session.tab()] = now
    late = [tab for tab, moment in list(last_drawn.items()) if now - moment > 10]
    for tab in late:
        last_drawn.pop(tab, None)
    crowd = min(math.ceil(len(last_drawn) / CROWD), LONGEST_BEAT)
    times = [at for _, at, _ in state.lines[-LAST:]] if state else []
    if len(times) < LAST:
        return float(max(crowd, 1))
    pace = min(statistics.median(b - a for a, b in itertools.pairwise(times)), 3)
    at_home = REDRAW / (SHARE * (os.cpu_count() or 1)) if st.context.ip_address is None else 0
    return float(max(crowd, pace, at_home, 1))


def look(run: Run) -> tuple[RunState, str]:
    """The fold of `run`'s events so far, and its status."""
    run_queue().watch(run.id)
    follower = _follower(str(run.folder), (run.folder / "config.json").stat().st_ino)
    state = follower.look()
    status = run.status(state.ended)
    if not state.ended and status in ("lost", "cancelled"):  # it may have ended, in writing, between the two looks
        state = follower.look()
        status = run.status(state.ended)
    return state, status


def runs() -> list[Run]:
    """The runs that this tab may see, newest first: all of them, or in a demo those that it started or has the address
    of."""
    if not run_queue().limits.demo:
        return store().runs()
    visible = []
    for run_id in session.mine():
        with contextlib.suppress(TrspError):
            visible.append(store().get(run_id))
    return visible


def get_run(run_id: str) -> Run:
    """The run of this id; the one that ships with the app comes among the others when it is first asked for.

    Raises TrspError: there is no such run.
    """
    if run_id == replay.RECORDED:
        return store().adopt(replay.FOLDER, run_id)
    return store().get(run_id)


@st.cache_resource(show_spinner=False, ttl=30, max_entries=64)
def facts(model: str) -> Facts | TrspError:
    """What the model's files say, or why they cannot be used; kept for a while, since each rerun asks."""
    try:
        refuse(run_queue().limits.check_model(model))
        return catalog.facts(model)
    except TrspError as error:
        return error


@st.cache_resource(show_spinner=False, ttl=30, max_entries=1)
def models_here() -> dict[str, Facts]:
    """The models that could be loaded now, by name; the folders of late runs among them."""
    folders = [name for name in store().models() if paths.folder(name)]
    return {model.name: model for model in catalog.here(folders)}


def forget_models() -> None:
    """Look at the disk again: a model has come."""
    facts.clear()
    models_here.clear()


@st.cache_resource(show_spinner=False)
def fetches() -> Downloads:
    """The fetches of all tabs."""
    return Downloads(limits.current(), ended=forget_models)


@st.cache_resource(show_spinner=False)
def _hub_models() -> dict[str, tuple[float, HubModel | TrspError]]:
    return {}


def hub_model(hub_id: str) -> HubModel | TrspError | None:
    """What the hub said of a model within the last ten minutes, whoever asked; None where nobody did."""
    asked_at, answer = _hub_models().get(hub_id, (0.0, None))
    return answer if time.monotonic() - asked_at < 600 else None


def look_up(hub_id: str) -> None:
    """Ask the hub, so that `hub_model` knows."""
    try:
        answer = download.look(hub_id, limits.current())
    except TrspError as error:
        answer = error
    _hub_models()[hub_id] = (time.monotonic(), answer)
