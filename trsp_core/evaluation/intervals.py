"""How sure a figure is: paired bootstrap over blocks, Wilson's interval of a share, and what may be claimed from them.

Imports no torch. Losses are mean nats a token of each measured block; runs are compared on the same blocks alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RESAMPLES = 4000
LEVEL = 0.95
# All n blocks lie on one side of the true median in 1 of 2^(n-1) draws, 1 of 16 for five: the whole range of fewer than
# six misses it more often than a 95 % interval may, and an interval that is resampled from them lies within that range.
LEAST_BLOCKS = 6

# The direction of every metric, declared once: True where higher is better.
HIGHER_IS_BETTER = {"perplexity": False, "kl": False, "accuracy": True, "speed": True}


def direction(metric: str) -> str:
    """`lower is better`, or `higher is better`, for a title."""
    return "higher is better" if HIGHER_IS_BETTER[metric] else "lower is better"


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its 95 % interval; they are no numbers where there are too few blocks for one."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval lies on one side of 0, else 0."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


def mean(losses: Sequence[float]) -> Interval:
    """Mean loss, resampled over blocks; of fewer than LEAST_BLOCKS without an interval.

    Raises:
        ValueError: no losses.
    """
    import numpy as np

    if not losses:
        raise ValueError("no losses")
    if len(losses) < LEAST_BLOCKS:
        return Interval(statistics.fmean(losses), math.nan, math.nan)
    values = np.asarray(losses, dtype=float)
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(statistics.fmean(losses), float(low), float(high))


def perplexity(losses: Sequence[float]) -> Interval:
    """exp of `mean`; infinity where it is beyond a float."""
    loss = mean(losses)
    return Interval(*(_exp(v) for v in (loss.value, loss.low, loss.high)))


def difference(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Mean of `one` minus `other`, block by block, in nats a token: below 0, `one` is better.

    Raises:
        ValueError: not the same number of blocks.
    """
    return mean([a - b for a, b in zip(one, other, strict=True)])


def factor(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Perplexity of `one` as a multiple of `other`'s, from the paired difference: 0.9 is 10 % lower."""
    loss = difference(one, other)
    return Interval(*(_exp(v) for v in (loss.value, loss.low, loss.high)))


def points(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Perplexity of `one` minus that of `other`, in points, both resampled over the same blocks: below 0, `one` is
    better.

    Raises:
        ValueError: no losses, or not the same number of blocks.
    """
    import numpy as np

    if not one or len(one) != len(other):
        raise ValueError("blocks that cannot be paired")
    value = _exp(statistics.fmean(one)) - _exp(statistics.fmean(other))
    if len(one) < LEAST_BLOCKS:
        return Interval(value, math.nan, math.nan)
    a, b = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    draws = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))
    with np.errstate(over="ignore", invalid="ignore"):
        differences = np.exp(a[draws].mean(axis=1)) - np.exp(b[draws].mean(axis=1))
        low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def share(right: int, total: int) -> Interval:
    """Wilson's interval of `right` out of `total` (Wilson 1927): unlike the plain one it stays within 0 and 1, and has
    a width also at 0 and at 1.

    Raises:
        ValueError: nothing was counted.
    """
    if total < 1:
        raise ValueError("nothing was counted")
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    p, scale = right / total, 1 + z * z / total
    middle = (p + z * z / (2 * total)) / scale
    reach = z / scale * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return Interval(p, max(middle - reach, 0.0), min(middle + reach, 1.0))


def only_at_home(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> bool:
    """Whether `one` beats `other` in the calibration domain for sure, and in the held-out domain not: then the gain is
    the text's, not the model's. Losses by domain."""
    home, away = (difference(one[d], other[d]).sign for d in ("calibration", "heldout"))
    return home < 0 and away >= 0


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
