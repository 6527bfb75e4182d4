"""Colours and their meanings: one colour a meaning, on every page and in every report.

The values are Okabe and Ito's, which people with any kind of colour vision can tell apart; where one is too dark for
the dark theme, its lighter sister stands in.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """A colour for each meaning.

    Attributes:
        kept, chosen, removed: the fates of a layer.
        dense: the model as it came. `pruned`: the model after deletion, or as it would be.
        pull: what a penalty adds to the loss.
        ink, faint: text and helping lines.
    """

    kept: str
    chosen: str
    removed: str
    dense: str
    pruned: str
    pull: str
    ink: str
    faint: str


PALETTES = {
    "light": Palette("#0072B2", "#E69F00", "#D55E00", "#5F6B76", "#009E73", "#CC79A7", "#1D2329", "#D5DADF"),
    "dark": Palette("#56B4E9", "#E69F00", "#E5743A", "#A7B0BA", "#20A06C", "#D99BBD", "#E8EAED", "#3A424B"),
}

FATES = ("kept", "chosen", "removed")
