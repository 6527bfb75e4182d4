"""What came out of a run, in plain words and with its protocol; and what to do where nothing came out."""

from __future__ import annotations

import math

import pandas as pd
import streamlit as st

from pages.ui.run import form
from pages.ui.style import words
from trsp_core import escaping, formatting
from trsp_core.pruning import transfers
from trsp_core.runs import resume
from trsp_core.runs.store import Run
from trsp_core.schema import turns
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import DOMAINS, PerplexityMeasured
from trsp_core.schema.run_state import RunState


def ending(run: Run, state: RunState, status: str) -> None:
    """How the run ended, where it did not end well, and what to do next."""
    where = f" at “{words.phase(state.phase)}”" if state.phase else " before it began"
    if status == "failed" and state.failure:
        st.error(
            f"**This run failed{where}.**\n\n{words.plain(state.failure.message)}\n\n"
            f"{words.plain(state.failure.remedy)}",
            icon=":material/error:",
        )
        if state.failure.trace:
            with st.expander("Trace, for a report"):
                st.code(escaping.lines(state.failure.trace), language=None)
    elif status == "cancelled":
        st.warning(
            f"**This run was stopped{where}.** {words.plain(state.stopped_why or run.cancel_reason())} "
            "What it measured until then stays below. "
            f"Resume it, run it again with the same settings, or change them first. {_outlook(run, state)}",
            icon=":material/stop_circle:",
        )
    elif status == "lost":
        st.warning(
            f"**This run was lost{where}.** {words.plain(run.hint())} What it wrote until then stays below. "
            f"Resume it to go on where it can, or run it again. {_outlook(run, state)}",
            icon=":material/link_off:",
        )
    elif status == "damaged":
        st.warning(
            "**This run has finished, but its record is damaged.** What can be read is below; what is missing stands "
            f"under it. Resume it to compute that again. {_outlook(run, state)}",
            icon=":material/heart_broken:",
        )


def _outlook(run: Run, state: RunState) -> str:
    """What a press of Resume would come to."""
    return f"Resumed: {words.plain(resume.outlook(run, state))}"


def summary(state: RunState, config: RunConfig, live: bool) -> None:
    """The result in sentences, then as a table; while the run is `live`, some of it is still being measured."""
    if not state.removed:
        return
    config = turns.applied(config, turns.values(state.turns))
    removed, total = state.removed, len(state.removed.removed) + len(state.removed.kept)
    before, after = removed.parameters_before, removed.parameters
    with st.container(border=True, key="result"):
        headline = f"**{len(removed.removed)} of {total} layers are gone** (layers {words.layers(removed.removed)})"
        if state.narrowed:
            headline = f"**No layer is gone, all {total} are narrower** ({state.narrowed.sentence})"
        if state.turns:
            headline += f" {words.STEERED}"
        st.markdown(
            f"{headline}: {formatting.parameters(after)} parameters instead of {formatting.parameters(before)}, "
            f"{words.share(before - after, before)} fewer."
        )
        if state.narrowed:
            st.markdown(
                f"Deleting as many layers as the ratio says would leave {formatting.parameters(state.narrowed.aim)}."
            )
        for domain in DOMAINS:
            st.markdown(_sentence(state, config, domain, live))
        if state.speed:
            st.markdown(_speed(state, total))
        st.table(table(state, config, live))
        st.caption(protocol(state))


def _sentence(state: RunState, config: RunConfig, domain: str, live: bool) -> str:
    """What happened to one domain's perplexity."""
    by = state.figures(domain)
    text = words.plain(_text(config.text if domain == "calibration" else config.heldout))
    before, after = (words.perplexity_or_wait(by, name, live) for name in ("dense", "pruned"))
    where = f"In the {words.DOMAINS[domain]} ({text}),"
    if "dense" not in by or "pruned" not in by:
        return f"{where} the dense model's perplexity: {before}; the pruned model's: {after}."
    start = f"{where} perplexity went from {before} to **{after}**."
    direct, pruned = by.get("direct"), by["pruned"]
    if not config.stage2_steps and not state.refits and direct == pruned:
        return start + f" There was no stage 2: the layers were {'narrowed' if state.narrowed else 'deleted'} at once."
    if direct is None or not math.isfinite(direct - pruned):
        return start
    better = blocks_better(state, domain)
    verdict = "lowered" if pruned < direct else "raised"
    change = words.share(abs(direct - pruned), direct)
    at_once, cause = "Deleting the same layers at once gives", words.plain(moved_by(config))
    if state.narrowed:
        at_once, cause = "Narrowed and not trained, it is", "training"
    end = f" {at_once} {formatting.perplexity(direct)}: {cause} {verdict} it by {change}"
    return start + end + (f", better in {better[0]} of {better[1]} blocks." if better else ".")


def moved_by(config: RunConfig) -> str:
    """What changed the kept layers, for a sentence: the repair, training, or both."""
    transfer = transfers.all_transfers().get(config.transfer)
    if not transfer or not transfer.repair:
        return "stage 2"
    repair = f"the repair “{transfer.title}”"
    return f"{repair} with {config.stage2_steps} steps of training" if config.stage2_steps else repair


def blocks_better(state: RunState, domain: str) -> tuple[int, int] | None:
    """In how many blocks the pruned model's loss is below direct deletion's, and of how many."""
    pruned, direct = _measured(state, "pruned", domain), _measured(state, "direct", domain)
    if not pruned or not direct or len(pruned.losses) != len(direct.losses):
        return None
    return sum(p < d for p, d in zip(pruned.losses, direct.losses, strict=True)), len(direct.losses)


def _speed(state: RunState, total: int) -> str:
    dense, pruned = state.speed.get("dense"), state.speed.get("pruned")
    if not dense or not pruned:
        return ""
    reads, writes = pruned.prefill / dense.prefill, pruned.decode / dense.decode
    if not state.ceiling or not state.removed:
        ceiling = "All layers still run one after the other, so there is no ceiling by their number to hold it against."
    else:
        ceiling = (
            f"The ceiling for {len(state.removed.kept)} of {total} layers is {formatting.ratio(state.ceiling)} times."
        )
        if max(reads, writes) > 1.05 * state.ceiling:
            ceiling += " What lies above it is the measurement's noise: the machine was busy with other things too."
    return (
        f"It reads a prompt of {pruned.prompt_tokens} tokens {formatting.ratio(reads)} times as fast as the "
        "dense model "
        f"({formatting.rate(pruned.prefill)} tokens a second) and writes {pruned.new_tokens} more "
        f"{formatting.ratio(writes)} times as fast "
        f"({formatting.rate(pruned.decode)} tokens a second). {ceiling}"
    )


def table(state: RunState, config: RunConfig, live: bool) -> pd.DataFrame:
    """Perplexity by state of the model and by domain."""
    names = words.NARROWED_STATES if state.narrowed else words.states_of(config)
    states = [s for s in names if s in state.perplexity]
    rows = {
        f"Perplexity, {words.DOMAINS[domain]}": [
            words.perplexity_or_wait(state.figures(domain), s, live) for s in states
        ]
        for domain in DOMAINS
    }
    return pd.DataFrame(rows, index=[names[s] for s in states])


def protocol(state: RunState) -> str:
    """How it was measured, so that another can repeat it."""
    parts = []
    for domain in DOMAINS:
        event = _measured(state, "dense", domain)
        if event:
            blocks = (
                f"{event.blocks} blocks of {event.block_length} tokens ({formatting.count(event.tokens)} predicted)"
            )
            parts.append(
                f"{words.DOMAINS[domain]}: {words.plain(_text(event.text))}, {blocks}, {words.plain(event.dtype)}"
            )
    return f"Lower is better. Protocol: {'; '.join(parts)}. No measured block was trained on."


def _measured(state: RunState, model_state: str, domain: str) -> PerplexityMeasured | None:
    return next((m for m in state.measured if m.state == model_state and m.domain == domain), None)


def notes(state: RunState) -> None:
    """What the run did differently, and why."""
    for note in state.notes:
        st.info(words.plain(note), icon=":material/info:")


def _text(name: str) -> str:
    return words.TEXTS.get(name) or form.title_of(name)
