"""A grid of runs: arms, each over the product of some axes. It is a way to write a plan with many variations, and
nothing more: what is read here is a `Plan`, whose variations know where in the grid they stand.

    {"name": "length", "title": "How long?", "preset": "quick", "base": {"lambda_1": 0.05},
     "axes": {"stage2_steps": [60, 240], "seed": [0, 1]},
     "arms": [{"name": "choice", "settings": {"stage2_steps": 0}, "axes": ["seed"]},
              {"name": "trsp", "title": "TRSP", "layers_of": "choice"},
              {"name": "control", "settings": {"control": "delete_first"}, "layers_of": "choice"}]}

An arm spans all axes, or those that it names; without arms there is one. `layers_of` and `as_long_as` name an earlier
arm whose axes the arm has too, and mean its point with the same values. `"continues": NAME` says that the points belong
to another grid's record as well: the same arms, further on along an axis. A grid with a `seed` axis is a study (see
`studies`); `"contests": [{"arm": "refit_10", "other": "none_90", "equal": "time"}]` says which of its arms are to be
set beside which. Imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trsp_core import paths
from trsp_core.errors import TrspError
from trsp_core.experiments import plans
from trsp_core.experiments.plans import Plan
from trsp_core.schema import codec
from trsp_core.schema.config import KNOBS

MOST = 1000  # points of one grid
EQUALS = ("steps", "time")  # what two arms may have in common
_PARTS = {"name", "title", "preset", "base", "axes", "arms", "continues", "contests"}
_ARM_PARTS = {"name", "title", "settings", "axes", "layers_of", "as_long_as"}
_SHORT = {"lambda_1": "λ₁", "lambda_2": "λ₂", "stage2_steps": "steps", "stage2_lr": "rate"}


@dataclass(frozen=True)
class GridPoint:
    """A point of a grid: its arm, and its value on each axis of the arm."""

    arm: str
    at: Mapping[str, Any]


@dataclass(frozen=True)
class Contest:
    """Two arms of a grid that are to be set beside each other: the same layers after the same steps, or the same time.

    Attributes:
        arm, other: names; `other` is the control.
        equal: one of `EQUALS`.
    """

    arm: str
    other: str
    equal: str


@dataclass(frozen=True)
class Grid:
    """A plan and the point of each of its variations, by name.

    Attributes:
        axes: knob to its values; `arms`: name to title.
        continues: the grid whose record this one's points belong to as well; "" for none.
        contests: which arms are to be set beside which, as far as the grid says so.
    """

    plan: Plan
    axes: Mapping[str, list[Any]]
    arms: Mapping[str, str]
    points: Mapping[str, GridPoint]
    continues: str = ""
    contests: tuple[Contest, ...] = ()


def read(path: str) -> Grid:
    """The grid in a JSON file.

    Raises:
        TrspError: no such file, no JSON, or something in it that cannot be used.
    """
    file = paths.file(path, "grid", "Name the path of a JSON file.")
    try:
        return parse(codec.decode(paths.content(file), dict))
    except ValueError as error:
        raise TrspError(f"The grid {path[:80]} is no JSON: {error}.", "Mend the file.") from error


def parse(document: Any) -> Grid:
    """A grid from decoded JSON.

    Raises:
        TrspError: a part is missing, unknown or of a wrong kind; the settings of every point are checked.
    """
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TrspError(
            f"This is no grid: {type(error).__name__} {str(error)[:80]}.",
            'It wants {"name", "base", "axes": {knob: [values]}}, and may have "title", "preset" and "arms".',
        ) from error


def _parse(document: Any) -> Grid:
    _only(document, _PARTS)
    axes = {str(knob): _values(values) for knob, values in dict(document.get("axes", {})).items()}
    arms = document.get("arms", [{"name": "point", "title": "Point"}])
    if not isinstance(arms, list) or not arms:
        raise ValueError("arms")
    spans: dict[str, list[str]] = {}
    variations: list[dict[str, Any]] = []
    points: dict[str, GridPoint] = {}
    for arm in arms:
        _only(arm, _ARM_PARTS)
        span = [str(a) for a in arm.get("axes", axes)]
        if set(span) - set(axes) or len(set(span)) < len(span):
            raise ValueError(f"axes of arm {arm['name']}")
        if math.prod(len(axes[a]) for a in span) + len(variations) > MOST:
            raise TrspError(f"This grid has more than {MOST} points.", "Take fewer values, or write several grids.")
        for other in (arm.get("layers_of", ""), arm.get("as_long_as", "")):
            if other and not set(spans.get(other, ["?"])) <= set(span):
                raise ValueError(f"arm {arm['name']} refers to {other}, which is not before it or has other axes")
        for values in itertools.product(*(axes[a] for a in span)):
            at = dict(zip(span, values, strict=True))
            variation = _variation(arm, at, spans)
            variations.append(variation)
            points[variation["name"]] = GridPoint(str(arm["name"]), at)
        spans[str(arm["name"])] = span
    body = {k: document[k] for k in ("name", "title", "preset", "base") if k in document}
    titles = {str(arm["name"]): str(arm.get("title") or arm["name"]) for arm in arms}
    plan = plans.parse(body | {"variations": variations})
    contests = tuple(codec.build(Contest, contest) for contest in document.get("contests", []))
    for contest in contests:
        if not {contest.arm, contest.other} <= set(titles) or contest.equal not in EQUALS:
            raise ValueError(f"contest {contest}: it wants two arms, and what is equal: {' or '.join(EQUALS)}")
    return Grid(plan, axes, titles, points, str(document.get("continues", "")), contests)


def _variation(arm: Any, at: Mapping[str, Any], spans: Mapping[str, list[str]]) -> dict[str, Any]:
    """A point as it is written in a plan. Where an arm and an axis set the same knob, the arm's value holds."""
    variation = {
        "name": _name(arm["name"], at),
        "title": ", ".join([str(arm.get("title") or arm["name"]), *(f"{label(k)} {v}" for k, v in at.items())]),
        "settings": {**at, **dict(arm.get("settings", {}))},
    }
    for link in ("layers_of", "as_long_as"):
        if arm.get(link):
            variation[link] = _name(arm[link], {a: at[a] for a in spans[arm[link]]})
    return variation


def label(knob: str) -> str:
    """What an axis is called in a title."""
    return _SHORT.get(knob) or knob.replace("_", " ")


def _name(arm: Any, at: Mapping[str, Any]) -> str:
    """The arm's name and 6 hex digits of its values: the same when an axis gets more values."""
    if not isinstance(arm, str) or len(arm) > 16:
        raise ValueError(f"arm {str(arm)[:40]!r}: at most 16 letters")
    values = json.dumps({k: at[k] for k in sorted(at)}, sort_keys=True)
    return f"{arm}_{hashlib.sha256(values.encode()).hexdigest()[:6]}" if at else arm


def _values(values: Any) -> list[Any]:
    """An axis: at least one plain value, none twice."""
    if not isinstance(values, list) or not values:
        raise ValueError("an axis wants a list of values")
    if any(not isinstance(v, (str, int, float, bool)) for v in values):
        raise ValueError("an axis wants numbers and words")
    if len({json.dumps(v) for v in values}) < len(values):
        raise ValueError("an axis names a value twice")
    return values


def _only(document: Any, parts: set[str]) -> None:
    unknown = set(document) - parts
    if unknown or not isinstance(document, dict):
        raise ValueError(f"unknown parts {', '.join(map(str, sorted(unknown, key=str)))}")
    knobs = set(document.get("axes", {}) if parts is _PARTS else ()) - set(KNOBS)
    if knobs:
        raise ValueError(f"axes that are no settings: {', '.join(map(str, knobs))}")
