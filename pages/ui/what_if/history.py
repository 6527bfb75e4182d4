"""Sets of removed layers as a person tries them: the set now, undo and redo, and the sets tried so far. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from pages.ui.style import words
from trsp_core import formatting
from trsp_core.schema.messages import SetMeasured

YOU = "You"
LOOKS = {  # how the figures of `board` are written; they are sorted as numbers
    "Times dense": formatting.ratio,
    "Calibration": formatting.perplexity,
    "Held out": formatting.perplexity,
    "KL held out": formatting.nats,
}


@dataclass(frozen=True)
class Choice:
    """Layers that are removed, and layers that no preset may remove; `who` made this choice."""

    removed: frozenset[int] = frozenset()
    protected: frozenset[int] = frozenset()
    who: str = field(default=YOU, compare=False)

    def preset(self, removed: frozenset[int], who: str) -> Choice:
        """Remove what `who` would, but no protected layer; where that makes a difference, the choice is yours."""
        unprotected = removed - self.protected
        return Choice(unprotected, self.protected, who if unprotected == removed else YOU)

    def toggled(self, layer: int, protecting: bool) -> Choice:
        """Remove or restore `layer`; with `protecting`, protect it or lift that. A removed layer is restored first."""
        if protecting:
            return Choice(self.removed - {layer}, self.protected ^ {layer})
        return Choice(self.removed ^ {layer}, self.protected - {layer})

    def fate(self, layer: int) -> str:
        return "removed" if layer in self.removed else "protected" if layer in self.protected else "kept"


@dataclass(frozen=True)
class Trials:
    """The choice now, what undo and redo go to, and every measured set with who chose it first."""

    now: Choice = Choice()
    past: tuple[Choice, ...] = ()
    future: tuple[Choice, ...] = ()
    measured_sets: Mapping[frozenset[int], tuple[str, SetMeasured]] = field(default_factory=dict)

    def choose(self, choice: Choice) -> Trials:
        if choice == self.now:
            return self
        return replace(self, now=choice, past=(*self.past, self.now)[-100:], future=())

    def undo(self) -> Trials:
        if not self.past:
            return self
        return replace(self, now=self.past[-1], past=self.past[:-1], future=(self.now, *self.future))

    def redo(self) -> Trials:
        if not self.future:
            return self
        return replace(self, now=self.future[0], past=(*self.past, self.now), future=self.future[1:])

    def add(self, measured: SetMeasured) -> Trials:
        """Remember a set that was measured, as of whoever chose it first."""
        key = frozenset(measured.removed)
        who = self.now.who if key == self.now.removed else YOU
        who = who if key else "Dense"
        return (
            self
            if key in self.measured_sets
            else replace(self, measured_sets={**self.measured_sets, key: (who, measured)})
        )


def lowest(scores: Mapping[int, float], count: int, protected: Iterable[int]) -> frozenset[int]:
    """The `count` layers of the lowest scores, protected ones aside."""
    free = sorted((i for i in scores if i not in set(protected)), key=lambda i: (scores[i], i))
    return frozenset(free[:count])


def times_dense(measured: SetMeasured) -> float:
    """Perplexity over the dense model's, in the geometric mean of both domains."""
    ratios = [
        math.log((measured.perplexity[d] or math.inf) / dense)
        for d, dense in measured.dense.items()
        if dense and d in measured.perplexity
    ]
    return math.exp(min(math.fsum(ratios) / len(ratios), 700)) if ratios else math.nan


def board(trials: Trials) -> pd.DataFrame:
    """The sets tried: those of as many layers as now first, best first."""
    count = len(trials.now.removed)
    order = sorted(
        trials.measured_sets.items(), key=lambda e: (abs(len(e[0]) - count), len(e[0]), times_dense(e[1][1]))
    )
    rows = [
        (
            who,
            words.layers(sorted(key)) if key else "none: dense",
            len(key),
            times_dense(m),
            m.perplexity.get("calibration"),
            m.perplexity.get("heldout"),
            m.kl.get("heldout"),
        )
        for key, (who, m) in order
    ]
    columns = ["Who", "Removed", "Layers", "Times dense", "Calibration", "Held out", "KL held out"]
    return pd.DataFrame(rows, columns=columns)


def ordered_sets(trials: Trials) -> list[frozenset[int]]:
    """The sets in the order of `board`."""
    count = len(trials.now.removed)
    return sorted(
        trials.measured_sets, key=lambda k: (abs(len(k) - count), len(k), times_dense(trials.measured_sets[k][1]))
    )


def verdict(trials: Trials) -> str:
    """Who is ahead among sets of as many layers as now: a sentence, or ""."""
    count = len(trials.now.removed)
    rivals = [(times_dense(m), who) for key, (who, m) in trials.measured_sets.items() if len(key) == count]
    if not count or len(rivals) < 2:
        return ""
    best, who = min(rivals)
    others = sorted(r for r in rivals if r[1] != who)
    be = "are" if who == YOU else "is"
    lead = f"**{who} {be} ahead** with {count} layers removed: {formatting.ratio(best)} times the dense perplexity"
    return lead + (
        f"; {others[0][1]}: {formatting.ratio(others[0][0])} times." if others else ", the best of the sets tried."
    )
