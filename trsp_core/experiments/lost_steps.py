"""The law of lost steps: what a step of fading is worth beside a step on the model as it will be. Pure; no torch.

Training what is left after deletion lowers the perplexity by a power of the number of steps T. Fading the chosen layers
out spends a share f of its steps on another network, the one in which those layers still act. If such a step is worth u
of a step on the pruned one, fading has had T (1 - f (1 - u)) steps:

    perplexity of the control ~ T^-b,      fade / control = (1 - f (1 - u))^-b

u = 1 would be no loss, u above 1 a gain, u = 0 steps for nothing. In logarithms, with d the mean difference of losses
(nats a token) between fading and the control, and b the control's slope at that length:

    u = 1 - (1 - exp(-d / b)) / f

u falls as d / b grows, so an interval of d / b is one of u. It is Fieller's (1954): d / b may be r where the t interval
over blocks of d_k - r b_k holds 0. It is as wide as the measured blocks differ; other seeds may differ more.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trsp_core import formatting
from trsp_core.evaluation import intervals
from trsp_core.evaluation.intervals import Interval
from trsp_core.experiments import grid_results
from trsp_core.experiments.grid_results import Point, Sweep

Losses = Mapping[int, Sequence[float]]  # by number of steps: of each measured block, mean nats a token
DOMAIN_NAMES = {"calibration": "calibration domain", "heldout": "held-out domain"}
FADING = ("anneal", "lambda_2", "control")  # settings in which fading and its control differ


@dataclass(frozen=True)
class LostSteps:
    """Fading beside its control after `steps` steps, in one domain.

    Attributes:
        share: f, of the steps that were spent on fading.
        slope: b, of the control at this length.
        ratio: the perplexity of fading over the control's, as it was measured.
        useless: what the law says of that ratio if steps of fading were worth nothing (u = 0).
        worth: u, not-a-number where the slope is 0. Its ends are infinite where that is not surely other than 0.
    """

    steps: int
    share: float
    slope: Interval
    ratio: Interval
    useless: float
    worth: Interval


def law(control: Losses, fading: Losses, share: float) -> list[LostSteps]:
    """What the law says at each length that both were measured at, the shortest first.

    Args:
        control: at two lengths or more, of the same blocks at each.
        fading: of the same blocks.
        share: f, above 0 and below 1.

    Raises:
        ValueError: the control has fewer than two lengths, or numbers of blocks differ.
    """
    rows = []
    for steps in sorted(set(control) & set(fading)):
        slopes = block_slopes(control, steps)
        gaps = [one - other for one, other in zip(fading[steps], control[steps], strict=True)]
        slope, ratio = intervals.mean(slopes), intervals.factor(fading[steps], control[steps])
        rows.append(LostSteps(steps, share, slope, ratio, (1 - share) ** -slope.value, _worth(gaps, slopes, share)))
    return rows


def block_slopes(control: Losses, steps: int) -> list[float]:
    """b of each block after `steps` steps: how its loss falls with the logarithm of the length, in the mean of the way
    to the next shorter and to the next longer one that was measured; at an end, of the one way that there is.

    Raises:
        ValueError: there is no other length.
    """
    lengths = sorted(control)
    if len(lengths) < 2:
        raise ValueError("a slope needs two lengths")
    ways = [pair for pair in itertools.pairwise(lengths) if steps in pair]
    slopes = [
        [(x - y) / math.log(longer / shorter) for x, y in zip(control[shorter], control[longer], strict=True)]
        for shorter, longer in ways
    ]
    return [statistics.fmean(of_block) for of_block in zip(*slopes, strict=True)]


def _worth(gaps: Sequence[float], slopes: Sequence[float], share: float) -> Interval:
    """u with its interval, from d_k and b_k of each block."""
    value, high, low = (1 - (1 - _exp(-r)) / share for r in _fieller(gaps, slopes))  # u falls as the ratio grows
    return Interval(value, low if math.isfinite(high) else -math.inf, high)


def _exp(power: float) -> float:
    return math.inf if power > 700 else math.exp(power)


def _fieller(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of the means of two paired samples, with the ends of its 95 % interval, the lower one first; infinite
    ends where the mean below is not surely other than 0."""
    top, bottom = intervals.mean(tops), intervals.mean(bottoms)
    ratio = top.value / bottom.value if bottom.value else math.nan
    if not bottom.sign:
        return ratio, -math.inf, math.inf
    # (top - r bottom)^2 is at most the square of its interval's half width: a parabola in r
    reach, below, both = (
        (part.high - part.low) ** 2 / 4
        for part in (top, bottom, intervals.mean([a + b for a, b in zip(tops, bottoms, strict=True)]))
    )
    shared = (both - reach - below) / 2
    square, slope, rest = bottom.value**2 - below, top.value * bottom.value - shared, top.value**2 - reach
    root = math.sqrt(max(slope * slope - square * rest, 0.0))
    return ratio, (slope - root) / square, (slope + root) / square


def of_sweep(sweep: Sweep, domain: str, seed: int = 0) -> dict[str, list[LostSteps]]:
    """The law in one domain on each arm that fades, by title, against the arm that deletes first and is otherwise set
    alike. Arms without such a control, or whose control has one length alone, are left out."""
    points = {arm: [p for p in sweep.of(arm) if p.seed == seed and p.steps] for arm in sweep.arms}
    laws = {}
    for arm, ones in points.items():
        share = _settings(sweep, ones[0]).get("anneal", 0.0) if ones else 0.0
        others = next((some for some in points.values() if some and _controls(sweep, some, ones)), [])
        if 0 < share < 1 and len({p.steps for p in others}) > 1:
            control, fading = ({p.steps: p.losses[domain] for p in side} for side in (others, ones))
            laws[sweep.arms[arm]] = law(control, fading, share)
    return laws


def _controls(sweep: Sweep, others: list[Point], ones: list[Point]) -> bool:
    """Whether `others` delete first, and differ from `ones` by that alone."""
    first = _settings(sweep, others[0])
    if first.get("control") != "delete_first" or not ones:
        return False
    one = next((p for p in ones if p.steps == others[0].steps and p.blocks == others[0].blocks), None)
    return one is not None and _rest(first) == _rest(_settings(sweep, one))


def _settings(sweep: Sweep, point: Point) -> dict[str, Any]:
    return {**sweep.shared, **point.settings}


def _rest(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in FADING}


def recorded() -> Sweep:
    """The sweeps that ship with fading and its control at several lengths, as one.

    Raises:
        TrspError: they cannot be read.
    """
    sweeps = [grid_results.load(grid_results.shipped() / f"{name}.json") for name in ("length", "long", "longest")]
    return grid_results.joined(sweeps)["length"]


HEADS = ("", "steps", "u", "measured", "at u = 0", "b")


def table(laws: Mapping[str, Sequence[LostSteps]]) -> list[list[str]]:
    """A row for each arm and length, in words, under `HEADS`: u, the ratio to the control that was measured, what it
    would be if fading steps were worth nothing, and the control's slope."""
    return [
        [
            arm,
            str(row.steps),
            in_words(row.worth),
            in_words(row.ratio, formatting.fine_ratio),
            formatting.fine_ratio(row.useless),
            formatting.fine_ratio(row.slope.value),
        ]
        for arm, rows in laws.items()
        for row in rows
    ]


def in_words(interval: Interval, kind: Callable[[float], str] = formatting.ratio) -> str:
    """A figure with its interval, a true minus before what is below 0: `−0.13 [−0.40, 0.08]`; `[no interval]` where the
    ends are infinite."""

    def signed(value: float) -> str:
        return kind(value).replace("-", "−") if math.isfinite(value) else formatting.NOT_A_NUMBER

    if math.isinf(interval.high):
        return f"{signed(interval.value)} [no interval]"
    return formatting.interval(interval.value, interval.low, interval.high, signed)


def sentences(laws: Mapping[str, Mapping[str, Sequence[LostSteps]]]) -> list[str]:
    """What the figures support; changes when they do.

    Args:
        laws: by domain, then by arm.
    """
    rows = [row for arms in laws.values() for of_arm in arms.values() for row in of_arm]
    if not rows:
        return [
            "No sweep has fading and its control at two lengths, so nothing can be said of what its steps are worth."
        ]
    less, more = sum(row.worth.high < 1 for row in rows), sum(row.worth.low > 1 for row in rows)
    first = (
        f"In {less} of {len(rows)} comparisons a step of fading is surely worth less than a step on the pruned model"
    )
    if less == len(rows):
        first = "In every comparison a step of fading is surely worth less than a step on the pruned model"
    result = [f"{first}, and in {more or 'none'} surely more."]
    for domain, arms in laws.items():
        arm = max(arms, key=lambda name: len(arms[name]))
        short, long = arms[arm][0], arms[arm][-1]
        result.append(
            f"In the {DOMAIN_NAMES[domain]} ({arm}) it is worth {in_words(short.worth)} of a step after {short.steps} "
            f"steps, and {in_words(long.worth)} after {long.steps}."
        )
    return result
