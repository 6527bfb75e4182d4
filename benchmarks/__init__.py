"""Benchmarks, one module each: `python -m benchmarks NAME --json`. A module defines `run() -> Iterator[Row]`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import trsp_core  # noqa: F401 - decides how threads wait, which has to come before torch


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        ratio: what was measured over what it is held against; median of the repeats.
        aim: the ratio to reach; None where nothing is aimed at. `better`: "lower" or "higher".
        spread: lowest and highest of the repeats.
        facts: what stands behind it, with units in the names.
    """

    benchmark: str
    ratio: float
    aim: float | None
    better: str
    spread: list[float]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether the median reaches the aim."""
        if self.aim is None:
            return True
        return self.ratio <= self.aim if self.better == "lower" else self.ratio >= self.aim


def row(benchmark: str, ratios: Sequence[float], aim: float | None, better: str, **facts: Any) -> Row:
    """A row from the ratios of the repeats."""
    spread = [round(min(ratios), 3), round(max(ratios), 3)]
    return Row(benchmark, round(statistics.median(ratios), 3), aim, better, spread, facts)
