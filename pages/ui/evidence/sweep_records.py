"""The records of sweeps that ship and those of this machine: each file is read once, until it changes."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from pages.ui.app_state import server
from trsp_core.errors import TrspError
from trsp_core.experiments import grid_results, studies
from trsp_core.experiments.grid_results import Sweep
from trsp_core.experiments.studies import SplitStudy

Files = tuple[tuple[str, int], ...]  # path, and when it was changed last, in nanoseconds


def sweeps() -> dict[str, Sweep]:
    """By name; one that was made here stands for a shipped one of its name where it has as many points."""
    return _sweeps(_files())


def over_splits() -> dict[str, SplitStudy]:
    """Those of `sweeps` that were measured on several splits, by name; those of the most splits first, and of equally
    many those with controls."""
    return _studies(_files())


def _files() -> Files:
    folders = grid_results.shipped(), grid_results.local(server.store().root)
    files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    return tuple((str(file), file.stat().st_mtime_ns) for file in files)


@st.cache_resource(show_spinner=False, max_entries=4)
def _sweeps(files: Files) -> dict[str, Sweep]:
    latest: dict[str, Sweep] = {}
    for path, changed in files:
        sweep = _load(path, changed)
        if sweep and len(sweep.points) >= len(latest[sweep.name].points if sweep.name in latest else []):
            latest[sweep.name] = sweep
    return grid_results.joined(latest.values())


@st.cache_resource(show_spinner=False, max_entries=4)
def _studies(files: Files) -> dict[str, SplitStudy]:
    by_name = {name: studies.read(sweep) for name, sweep in _sweeps(files).items()}
    several = {name: study for name, study in by_name.items() if study}
    return dict(sorted(several.items(), key=lambda item: (-len(item[1].splits), not item[1].pairs, -len(item[1].rows))))


@st.cache_resource(show_spinner=False, max_entries=60)
def _load(path: str, changed: int) -> Sweep | None:
    try:
        return grid_results.load(Path(path))
    except TrspError:
        return None
