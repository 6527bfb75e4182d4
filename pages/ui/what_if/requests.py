"""The sets that this tab tries on a run: asked of the workbench, taken in as they are answered, kept for undo."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pages.ui.app_state import session
from pages.ui.compare import model_choice
from pages.ui.what_if import history
from pages.ui.what_if.history import Choice, Trials
from trsp_core.errors import TrspError
from trsp_core.runs.store import Run
from trsp_core.schema import messages as an
from trsp_core.schema.config import RunConfig
from trsp_core.schema.messages import SetMeasured, Variant
from trsp_core.schema.run_state import RunState
from trsp_core.workbench.client import Reading

SHORTGPT = "ShortGPT"


def take_in(run: Run, config: RunConfig, state: RunState) -> SetMeasured | None:
    """Put what has been answered into the trials; the latest figures."""
    rating = read(key(run, "rating"))
    asked = [(ticket, model_choice.answers(ticket)) for ticket in session.get(key(run, "asked")) or []]
    for answer in (a for _, reading in asked if reading for a in reading.answers if isinstance(a, SetMeasured)):
        put_trials(run, trials_of(run).add(answer))
        session.put(key(run, "measured"), answer)
    session.put(key(run, "asked"), [ticket for ticket, reading in asked if reading and reading.ending is None])
    if rating is not None and isinstance(rating.ending, an.Answered) and not session.get(key(run, "influence")):
        scores = {a.layer: a.value for a in rating.answers if isinstance(a, an.LayerRated)}
        session.put(key(run, "influence"), scores)
        if session.get("what-if-wanted") == SHORTGPT:
            session.put("what-if-wanted", None)
            choose_by_influence(run, config, state, scores)
    return session.get(key(run, "measured"))


def choose_by_influence(run: Run, config: RunConfig, state: RunState, scores: Mapping[int, float]) -> None:
    """As many layers as the run chose (else as are removed now), those of the lowest block influence."""
    now = trials_of(run).now
    chosen = history.lowest(scores, len(state.chosen) or len(now.removed), now.protected)
    choose(run, config, trials_of(run).choose(Choice(chosen, now.protected, SHORTGPT)))


def begin(run: Run, config: RunConfig, depth: int) -> None:
    """When this tab comes to the run first: the set in the address, which is measured at once."""
    if session.get(key(run, "trials")) is None:
        layers = frozenset(range(depth))
        named, safe = session.set_in_address(), session.set_in_address("safe")
        removed = named if named < layers else frozenset()
        put_trials(run, Trials(Choice(removed, (safe & layers) - removed)))
        if removed:
            choose(run, config, trials_of(run))


def forget(run: Run) -> None:
    """Begin anew on this run the next time that it is shown: the set in the address counts again."""
    for what in ("trials", "ticket", "asked"):
        session.put(key(run, what), None)


def choose(run: Run, config: RunConfig, changed: Trials) -> None:
    """Make `changed` the trials, and ask for the figures of its set; an earlier question is dropped."""
    put_trials(run, changed)
    session.show_set(changed.now.removed, changed.now.protected)
    request = an.WhatIf(
        config.model, sorted(changed.now.removed), config.text, config.heldout, config.seed, config.prompt
    )
    if _ask(key(run, "ticket"), request):
        asked = session.get(key(run, "asked")) or []
        session.put(key(run, "asked"), [*asked, session.get(key(run, "ticket"))])
        if not session.get(key(run, "influence")):
            rate(run, config)


def rate(run: Run, config: RunConfig) -> None:
    """Ask for the block influence of every layer, once."""
    asked = read(key(run, "rating"))
    if asked is None or isinstance(asked.ending, an.Stopped | an.Broken | an.Refused):
        variant = dataclasses.asdict(Variant(config.model))
        _ask(key(run, "rating"), an.Influence(variant, config.text, config.heldout, config.seed))


def _ask(name: str, request: an.Request) -> bool:
    """Ask the workbench instead of what was asked under `name` before, and keep the ticket there; where it cannot be
    asked, say why."""
    try:
        session.put(name, model_choice.workbench().ask(request, session.get(name) or "", session.visitor()))
    except TrspError as error:
        session.put("what-if-error", str(error))
        return False
    session.put("what-if-error", "")
    return True


def waited_for(run: Run) -> tuple[bool, bool]:
    """Whether there are answers to come: figures of a set, and the block influence of every layer."""
    answers = read(key(run, "ticket")), read(key(run, "rating"))
    figures, rating = (a is not None and a.ending is None for a in answers)
    return figures, rating


def read(name: str, wait: float = 0.0) -> Reading | None:
    """What has been answered to the question kept under `name`, after up to `wait` seconds for more of it."""
    ticket = session.get(name)
    return model_choice.answers(ticket, wait) if ticket else None


def trials_of(run: Run) -> Trials:
    """This tab's trials on `run`, once it has begun."""
    return session.get(key(run, "trials"))


def put_trials(run: Run, changed: Trials) -> None:
    """Remember `changed` for this tab."""
    session.put(key(run, "trials"), changed)


def key(run: Run, what: str) -> str:
    """Where the session keeps `what` of a run."""
    return f"what-if-{what}-{run.id}"
