"""Which models there are to ask in the light of a run, and why one that a person might look for is not there."""

from __future__ import annotations

from pages.ui.app_state import server
from pages.ui.run import run_status
from pages.ui.run.subjects import Subject
from trsp_core.runs import replay
from trsp_core.runs.store import Run
from trsp_core.schema.config import RunConfig
from trsp_core.schema.messages import Variant
from trsp_core.schema.run_state import RunState
from trsp_core.workbench import transcript

OTHERS = 8  # newest other runs whose pruned models are offered


def variants(subject: Subject) -> dict[str, Variant]:
    """Every model that can be asked in the light of `subject`, by its label."""
    run, config, state = subject.run, subject.config, subject.state
    models = {"Dense": Variant(config.model, label="Dense")}
    if state.chosen:
        label = "Deleted at once"
        models[label] = Variant(config.model, removed=sorted(state.chosen), label=label)
    if run and (before := trained_of(run, config, state, "Before deletion")):
        models["Before deletion"] = before
    if run and (pruned := pruned_of(run, config, state, "Pruned")):
        models["Pruned"] = pruned
    for other in server.runs()[:OTHERS]:
        if run and other.id == run.id:
            continue
        settings = run_status.config_of(other)
        if settings and (pruned := pruned_of(other, settings, server.look(other)[0], "")):
            label = f"Pruned, {run_status.when(other)}"
            models[label] = Variant(pruned.model, base=pruned.base, kept=pruned.kept, label=label)
    return models


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


def missing(subject: Subject) -> str:
    """Why a model that one might look for is not offered: a sentence."""
    run, config, state = subject.run, subject.config, subject.state
    if run is None or run.id == replay.RECORDED:
        texts = bool(transcript.comparisons(Run(replay.FOLDER)))
        instead = "its texts after the ready prompts do" if texts else "so deletion at once stands in for it"
        return f"The recorded run's pruned model does not ship, {instead}."
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
    if config.deletes_first:
        return "This run deleted first, so it has no trained model with all layers."
    return "The model before deletion was measured, but not kept: turn on “Keep the model before deletion” for that."
