"""The workbench as pages see it: which models there are to ask, and how a request stands."""

from __future__ import annotations

import streamlit as st

from pages.ui.app_state import server
from pages.ui.run import run_status
from pages.ui.style import words
from trsp_core.errors import TrspError
from trsp_core.runs.store import Run
from trsp_core.schema import messages as an
from trsp_core.schema.config import RunConfig
from trsp_core.schema.messages import Variant
from trsp_core.schema.run_state import RunState
from trsp_core.workbench.client import Reading, Workbench

OTHERS = 8  # newest other runs whose pruned models are offered


@st.cache_resource(show_spinner=False, on_release=lambda workbench: workbench.close())
def workbench() -> Workbench:
    """The one workbench; its process starts with the first request."""
    return Workbench()


def variants(run: Run, config: RunConfig, state: RunState) -> dict[str, Variant]:
    """Every model that can be asked in the light of `run`, by its label."""
    found = {"Dense": Variant(config.model, label="Dense")}
    if state.chosen:
        label = "Deleted at once"
        found[label] = Variant(config.model, removed=sorted(state.chosen), label=label)
    if before := trained_of(run, config, state, "Before deletion"):
        found["Before deletion"] = before
    if pruned := pruned_of(run, config, state, "Pruned"):
        found["Pruned"] = pruned
    for other in server.runs()[:OTHERS]:
        if other.id == run.id:
            continue
        settings = run_status.config_of(other)
        if settings and (pruned := pruned_of(other, settings, server.look(other)[0], "")):
            label = f"Pruned, {run_status.when(other)}"
            found[label] = Variant(pruned.model, base=pruned.base, kept=pruned.kept, label=label)
    return found


def trained_of(run: Run, config: RunConfig, state: RunState, label: str) -> Variant | None:
    """The model after stage 2 with all its layers, if `run` keeps it."""
    if not state.removed or not (run.trained_folder / "config.json").is_file():
        return None
    every = sorted(state.removed.kept + state.removed.removed)
    return Variant(str(run.trained_folder), base=config.model, kept=every, label=label)


def pruned_of(run: Run, config: RunConfig, state: RunState, label: str) -> Variant | None:
    """The pruned model that `run` keeps, if it keeps one; the one before deletion holds the same tensors."""
    if not state.removed or not (run.model_folder / "config.json").is_file():
        return None
    base = trained_of(run, config, state, "")
    return Variant(
        str(run.model_folder), base=base.model if base else config.model, kept=state.removed.kept, label=label
    )


def missing(run: Run, config: RunConfig, state: RunState) -> str:
    """Why a model that one might look for is not offered: a sentence."""
    parts = []
    if pruned_of(run, config, state, "") is None:
        if not state.ended:
            parts.append("The pruned model is there once the run has finished.")
        elif state.narrowed:
            parts.append("This run did not keep its narrowed model, and no deletion of layers can stand in for it.")
        elif state.ended == "finished":
            parts.append("This run did not keep its pruned model, so deletion at once stands in for it.")
        else:
            parts.append("This run did not finish, so there is no pruned model.")
    if state.removed and trained_of(run, config, state, "") is None:
        parts.append(_no_trained(config))
    return " ".join(parts)


def _no_trained(config: RunConfig) -> str:
    if not config.stage2_steps:
        return "There was no stage 2, so there is no model before deletion but the dense one."
    if config.control == "delete_first":
        return "This run deleted first, so it has no trained model with all layers."
    return "The model before deletion was measured, but not kept: turn on “Keep the model before deletion” for that."


def answers(ticket: str, wait: float = 0.0) -> Reading | None:
    """What has been answered to the request with `ticket`, after up to `wait` seconds for more of it; None where its
    answers are no longer kept."""
    try:
        first = workbench().read(ticket)
        return workbench().follow(ticket, len(first.answers), wait) if wait and not first.ending else first
    except TrspError:
        return None


def waiting(reading: Reading) -> str:
    """What a request waits for: a sentence; "" once there are answers."""
    second = " A run is training on this machine and goes first." if server.jobs().goes_first() else ""
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
    """Say so where it was refused, stopped, or broke off."""
    ending = reading.ending
    if isinstance(ending, an.Broken):
        st.error(f"{words.plain(ending.message)} {words.plain(ending.remedy)}", icon=":material/error:")
    elif isinstance(ending, an.Refused):
        st.warning(f"{words.plain(ending.message)} {words.plain(ending.remedy)}", icon=":material/block:")
    elif isinstance(ending, an.Stopped):
        st.caption(":material/stop_circle: Stopped. What was written until then stays.")
