"""The sets of layers that this tab tries on a model: sent to the workbench, added when answered, kept for undo."""

from __future__ import annotations

from collections.abc import Mapping

from pages.ui.app_state import session, workbench
from pages.ui.run.subjects import Subject
from pages.ui.what_if import history
from pages.ui.what_if.history import Choice, Trials
from trsp_core.errors import TrspError
from trsp_core.schema import messages as an
from trsp_core.schema.messages import SetMeasured, Variant
from trsp_core.workbench.client import Reading

SHORTGPT = "ShortGPT"


def take_in(subject: Subject) -> SetMeasured | None:
    """Add every new answer to the trials. Returns the latest figures."""
    rating = read(key(subject.id, "rating"))
    open_requests = [(ticket, workbench.answers(ticket)) for ticket in session.get(key(subject.id, "asked")) or []]
    for answer in (a for _, reading in open_requests if reading for a in reading.answers if isinstance(a, SetMeasured)):
        put_trials(subject, trials_of(subject).add(answer))
        session.put(key(subject.id, "measured"), answer)
    unanswered = [ticket for ticket, reading in open_requests if reading and reading.ending is None]
    session.put(key(subject.id, "asked"), unanswered)
    if rating is not None and isinstance(rating.ending, an.Answered) and not session.get(key(subject.id, "influence")):
        scores = {a.layer: a.value for a in rating.answers if isinstance(a, an.LayerRated)}
        session.put(key(subject.id, "influence"), scores)
        if session.get("what-if-wanted") == SHORTGPT:
            session.put("what-if-wanted", None)
            choose_by_influence(subject, scores)
    return session.get(key(subject.id, "measured"))


def choose_by_influence(subject: Subject, scores: Mapping[int, float]) -> None:
    """As many layers as the run chose (else as are removed now), those of the lowest block influence."""
    now = trials_of(subject).now
    chosen = history.lowest(scores, len(subject.reference) or len(now.removed), now.protected)
    choose(subject, trials_of(subject).choose(Choice(chosen, now.protected, SHORTGPT)))


def begin(subject: Subject) -> None:
    """When this tab comes to the subject first: the set in the address is asked for at once, and so is the influence of
    each layer where no run has weights to show. The model is loaded meanwhile."""
    config = subject.config
    workbench.prepare(an.Prepare(config.model, config.text, config.heldout, config.seed))
    if session.get(key(subject.id, "trials")) is None:
        layers = frozenset(range(subject.depth))
        named, safe = session.set_in_address(), session.set_in_address("safe")
        removed = named if named < layers else frozenset()
        put_trials(subject, Trials(Choice(removed, (safe & layers) - removed)))
        if removed or not subject.run:
            choose(subject, trials_of(subject))


def forget(subject_id: str) -> None:
    """Begin anew on this subject the next time that it is shown: the set in the address counts again."""
    for what in ("trials", "ticket", "asked"):
        session.put(key(subject_id, what), None)


def choose(subject: Subject, changed: Trials) -> None:
    """Make `changed` the trials, and ask for the figures of its set; an earlier question is dropped."""
    put_trials(subject, changed)
    session.show_set(changed.now.removed, changed.now.protected)
    config = subject.config
    request = an.WhatIf(
        config.model, sorted(changed.now.removed), config.text, config.heldout, config.seed, config.prompt
    )
    if _ask(key(subject.id, "ticket"), request):
        tickets = session.get(key(subject.id, "asked")) or []
        session.put(key(subject.id, "asked"), [*tickets, session.get(key(subject.id, "ticket"))])
        if not session.get(key(subject.id, "influence")):
            rate(subject)


def rate(subject: Subject) -> None:
    """Ask for the block influence of every layer, once."""
    rating, config = read(key(subject.id, "rating")), subject.config
    if rating is None or isinstance(rating.ending, an.Stopped | an.Broken | an.Refused):
        _ask(key(subject.id, "rating"), an.Influence(Variant(config.model), config.text, config.heldout, config.seed))


def _ask(name: str, request: an.Request) -> bool:
    """Send a request to the workbench, and keep its ticket under `name`; the request before it there is cancelled.
    Returns whether it was accepted; if not, the page shows why."""
    try:
        session.put(name, workbench.ask(request, instead=session.get(name) or ""))
    except TrspError as error:
        session.put("what-if-error", str(error))
        return False
    session.put("what-if-error", "")
    return True


def waited_for(subject: Subject) -> tuple[bool, bool]:
    """Whether there are answers to come: figures of a set, and the block influence of every layer."""
    answers = read(key(subject.id, "ticket")), read(key(subject.id, "rating"))
    figures, rating = (a is not None and a.ending is None for a in answers)
    return figures, rating


def read(name: str, wait: float = 0.0) -> Reading | None:
    """What has been answered to the question kept under `name`, after up to `wait` seconds for more of it."""
    ticket = session.get(name)
    return workbench.answers(ticket, wait) if ticket else None


def trials_of(subject: Subject) -> Trials:
    """This tab's trials on `run`, once it has begun."""
    return session.get(key(subject.id, "trials"))


def put_trials(subject: Subject, changed: Trials) -> None:
    """Remember `changed` for this tab."""
    session.put(key(subject.id, "trials"), changed)


def key(subject_id: str, what: str) -> str:
    """Where the session keeps `what` of a subject."""
    return f"what-if-{what}-{subject_id}"
