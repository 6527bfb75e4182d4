"""Before a run: the stack as it would be left, and what remains in size and speed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import streamlit as st

from pages.ui.app_state import server, session, workbench
from pages.ui.run import subjects
from pages.ui.run.start import Draft
from pages.ui.style import theme, words
from trsp_core import formatting
from trsp_core.charts.palette import PALETTES
from trsp_core.errors import TrspError
from trsp_core.models import inspection
from trsp_core.models.catalog import Facts
from trsp_core.pruning import methods
from trsp_core.runs import precedents, replay
from trsp_core.runs.precedents import Precedent
from trsp_core.runs.store import Run
from trsp_core.schema import config as configs
from trsp_core.schema import messages as an
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.schema.messages import Influence, Variant
from trsp_core.workbench import recorded
from trsp_core.workbench.client import Reading

LATEST = 40  # runs that are looked through
BEAT = 1.0  # seconds between two looks at what the workbench measures


@dataclass(frozen=True)
class Guess:
    """Layers that would go, and how that is known: a sentence."""

    layers: tuple[int, ...]
    source: str


def area(draft: Draft) -> None:
    """The stack and its sentences; nothing where no layer goes, or the form or the model cannot be used."""
    config, facts = draft.config, draft.facts
    if config is None or facts is None or draft.problems or methods.get(config.method).narrow:
        return
    count = configs.count_to_remove(config, facts.n_layers)
    if not count:
        return
    guess = known(config, count)
    if guess is None and not draft.missing and facts.parameters <= workbench.LIGHT:
        ticket = _ask(config)
        reading = workbench.answers(ticket) if ticket else None
        live = reading is not None and reading.ending is None
        st.fragment(_measured, run_every=BEAT if live else None)(config, facts, count, ticket, live)
    elif guess is not None:
        _show(guess, config, facts)


def known(config: RunConfig, count: int) -> Guess | None:
    """Which layers would go, as the form itself, an earlier run, the recorded one or recorded figures tell."""
    if config.method == "manual":
        return Guess(tuple(configs.parse_layers(config.layers)), "These are the layers that you named.")
    hint = precedents.nearest(config, count, _precedents())
    if hint is not None:
        return Guess(hint.layers, _source(hint, config))
    question = Influence(Variant(config.model), config.text, config.heldout, config.seed)
    with contextlib.suppress(TrspError):  # limits speak where it is started
        reading = _recorded(question)
        return _by_influence(reading, count, config) if reading else None
    return None


def _recorded(question: Influence) -> dict[int, float]:
    """Block influence by layer as it ships; {} where it was not recorded."""
    answers, _ = recorded.answers(question)
    return {a.layer: a.value for a in answers if isinstance(a, an.LayerRated)}


def _by_influence(scores: dict[int, float], count: int, config: RunConfig) -> Guess:
    """The layers of the lowest block influence, less those that the form protects."""
    last = len(scores) - config.protect_last
    free = [i for i in scores if config.protect_first <= i < last] or list(scores)
    layers = tuple(sorted(free, key=scores.__getitem__)[:count])
    if config.method == "shortgpt":
        return Guess(layers, "By block influence on a block of each text; the run measures it on more.")
    return Guess(
        layers, "A guess by block influence alone (ShortGPT's measure), since no run has chosen with such settings yet."
    )


def _source(hint: precedents.Hint, config: RunConfig) -> str:
    """From which run it is known, and in what that differs from the form."""
    run_id, other = hint.precedent.run_id, hint.precedent.config
    which = "the recorded run" if run_id == replay.RECORDED else f"the run of {words.when(run_id, 0.0)}"
    if not hint.differences:
        return f"As {which} chose, with the same settings of the choice."
    parts = [f"“{KNOBS[name].label}” was {_value(getattr(other, name))}" for name in hint.differences]
    return f"A guess from {which}, where {words.plain(' and '.join(parts))}."


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return formatting.setting(value) if isinstance(value, int | float) else str(value)


def _precedents() -> list[Precedent]:
    """The recorded run and the latest others that have chosen layers, the newest first, the recorded one last."""
    runs = [run for run in server.runs()[:LATEST] if run.id != replay.RECORDED]
    entries = [_precedent(str(run.folder), _changed(run), run.id) for run in runs]
    shipped = subjects.shipped()
    last = Precedent(replay.RECORDED, shipped.config, tuple(shipped.state.chosen))
    return [*(entry for entry in entries if entry), last]


def _changed(run: Run) -> float:
    with contextlib.suppress(OSError):
        return (run.folder / "summary.json").stat().st_mtime
    return 0.0


@st.cache_resource(show_spinner=False, max_entries=4 * LATEST)
def _precedent(folder: str, changed: float, run_id: str) -> Precedent | None:
    """The run in `folder`, whose summary was `changed` then; None where it has none yet, or chose nothing."""
    if not changed:
        return None
    try:
        run = Run(Path(folder))
        config, chosen = run.config(), tuple(run.summary()["chosen"])
    except (TrspError, OSError, KeyError):
        return None
    return Precedent(run_id, config, chosen) if chosen else None


def _ask(config: RunConfig) -> str:
    """The ticket of the question for each layer's block influence, asked once for a model and its texts; "" where it
    cannot be asked."""
    question = Influence(Variant(config.model), config.text, config.heldout, config.seed)
    last_question, last_ticket = session.get("preview-asked") or (None, "")
    if last_question == question and workbench.answers(last_ticket):
        return last_ticket
    try:
        ticket = workbench.ask(question, instead=last_ticket)
    except TrspError:
        return ""
    session.put("preview-asked", (question, ticket))
    return ticket


def _measured(config: RunConfig, facts: Facts, count: int, ticket: str, live: bool) -> None:
    """What the workbench says; drawn again while it measures."""
    reading: Reading | None = workbench.answers(ticket) if ticket else None
    if live and (reading is None or reading.ending is not None):
        st.rerun()
    if reading is None:
        return
    if isinstance(reading.ending, an.Answered):
        scores = {a.layer: a.value for a in reading.answers if isinstance(a, an.LayerRated)}
        _show(_by_influence(scores, count, config), config, facts)
    elif reading.ending is None:
        wait = workbench.waiting(reading) or "Measuring each layer's influence."
        st.caption(f":material/hourglass_top: Which layers may go is being looked at. {wait}")


def _show(guess: Guess, config: RunConfig, facts: Facts) -> None:
    """The stack as a row of boxes, and the sentences."""
    removed = set(guess.layers)
    with st.container(border=True, key="preview"):
        st.markdown(f"**Layers {words.layers(list(guess.layers))} would go.** :gray[{guess.source}]")
        st.html(_boxes(facts.n_layers, removed))
        st.markdown(_remains(guess.layers, config, facts))


def _boxes(depth: int, removed: set[int]) -> str:
    """A box a layer, input at the left. Numbers alone go in, so nothing has to be escaped."""
    palette = PALETTES[theme.mode()]
    box_style = "text-align:center;font-size:0.75rem;line-height:1.6rem;border-radius:3px;"
    stays = f"{box_style}background:{palette.kept};color:{'#fff' if theme.mode() == 'light' else '#14181D'}"
    goes = f"{box_style}border:1px dashed {palette.removed};color:{palette.ink};text-decoration:line-through"
    boxes = "".join(f'<span style="{goes if i in removed else stays}">{i}</span>' for i in range(depth))
    label = f"{depth} layers, of which {words.layers(sorted(removed))} would go"
    grid = "display:grid;grid-template-columns:repeat(auto-fit,minmax(1.6rem,1fr));gap:3px"
    return f'<div role="img" aria-label="{label}" style="{grid}">{boxes}</div>'


def _remains(layers: Sequence[int], config: RunConfig, facts: Facts) -> str:
    """Size and speed of what is left."""
    sizes = [size for i, size in enumerate(facts.layer_parameters) if i not in layers]
    parameters = facts.parameters - sum(facts.layer_parameters) + sum(sizes)
    rest = replace(facts, parameters=parameters, layer_parameters=sizes)
    before, after = (inspection.weight_bytes(f, config.precision, config.compute_dtype) for f in (facts, rest))
    return (
        f"**{len(sizes)} of {facts.n_layers} layers stay:** {formatting.parameters(parameters)} parameters instead of "
        f"{formatting.parameters(facts.parameters)}, {formatting.size(after)} instead of {formatting.size(before)}, at "
        f"most {formatting.ratio(facts.n_layers / len(sizes))} times as fast."
    )
