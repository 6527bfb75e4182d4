"""A study as a record, made up: arms at given losses on several splits, whose texts are hard or easy alike for all."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from trsp_core.experiments.grid_results import ChoiceRound, Point, Sweep
from trsp_core.schema.events import DOMAINS

PROTOCOL = {"calibration": "wikipedia: 12 blocks", "heldout": "news: 12 blocks"}
NONE: dict[str, Any] = {"transfer": "none"}


def losses(level: float, seed: int, noise: float = 0.0) -> list[float]:
    """Twelve blocks of split `seed` around `level`, and a part that is this row's own."""
    texts, own = random.Random(seed), random.Random(f"{seed} {level}")
    middle = level + 0.4 * texts.random() + noise * own.gauss(0, 1)
    return [round(middle + 0.3 * texts.random(), 8) for _ in range(12)]


def point(arm: str, at: dict[str, Any], levels: tuple[float, float], noise: float = 0.01, **more: Any) -> Point:
    seed = at["seed"]
    values: dict[str, Any] = {
        "name": f"{arm}-{at}", "title": f"{arm} {at}", "arm": arm, "at": at, "settings": {}, "removed": [2, 3],
        "weights": [], "blocks": {d: f"{d}-{seed}" for d in DOMAINS}, "kl": {}, "seed": seed, "steps": 0,
        "losses": {d: losses(v, seed, noise) for d, v in zip(DOMAINS, levels, strict=True)},
        "direct": {d: losses(5.0, seed) for d in DOMAINS}, "seconds": 0.0,
    }  # fmt: skip
    return Point(**values | more)


def sweep(name: str, title: str, points: list[Point], axes: Mapping[str, list[Any]], **more: Any) -> Sweep:
    arms = {arm: f"Title of {arm}" for arm in dict.fromkeys(p.arm for p in points)}
    dense = {f"{d}-{seed}": losses(2.9, seed) for d in DOMAINS for seed in axes["seed"]}
    return Sweep(
        name, title, "tiny", "2026-01-01", len(points), PROTOCOL, {}, dict(axes), arms, dense, points,
        n_layers=8, **more
    )  # fmt: skip


def transfers(splits: Sequence[int] = range(5), noise: float = 0.01, **more: Any) -> Sweep:
    """Refit in order far ahead of the control after the same steps, and as good as it in the same time."""
    points = []
    for seed in splits:
        at, removed = {"seed": seed}, [2, 3] if seed else [2, 4]
        manual = {"method": "manual", "layers": ",".join(map(str, removed))}
        rounds = [ChoiceRound(2, 0.01, 0.004), ChoiceRound(removed[1], 0.001, 0.004)]
        for arm, level, steps, settings in (
            ("direct", 4.0, 0, NONE),
            ("refit", 3.6, 0, {"transfer": "refit", **manual}),
            ("refit_10", 3.4, 10, {"transfer": "refit", **manual}),
            ("none_10", 3.7, 10, {**NONE, **manual}),
            ("none_90", 3.4001, 90, {**NONE, **manual}),
            ("penalty_10", 3.8, 10, {"lambda_2": 10.0, **manual}),
        ):
            repair = {"repairing": 90.0} if "refit" in arm else {}
            mine = {"rounds": rounds} if arm == "direct" else {}
            settings = {**settings, "stage2_steps": steps, "seed": seed}
            points.append(
                point(arm, at, (level, level + 0.6), noise, settings=settings, steps=steps, seconds=1.3 * steps,
                      removed=removed, **repair, **mine)
            )  # fmt: skip
    return sweep("splits", "Transfers over splits", points, {"seed": list(splits)}, **more)


def choices(splits: Sequence[int] = range(5), noise: float = 0.3) -> Sweep:
    """Methods that choose by themselves; the first two are as good as each other, the third is far behind."""
    points = []
    for seed in splits:
        for arm, level, removed in (("trsp", 4.0, [2, 3 + seed % 2]), ("sleb", 4.001, [2, 3]), ("last", 7.0, [6, 7])):
            method = {} if arm == "trsp" else {"method": arm}
            settings = {**NONE, **method, "seed": seed, "stage2_steps": 0}
            points.append(point(arm, {"seed": seed}, (level, level), noise, settings=settings, removed=removed))
    return sweep("choices", "Choices over splits", points, {"seed": list(splits)})


def ratios(splits: Sequence[int] = (0, 1)) -> Sweep:
    """Two treatments: one is over ten times dense from 0.4 on, the other on one of the splits at 0.6."""
    points = []
    for ratio in (0.2, 0.4, 0.6):
        for seed in splits:
            at, shared = {"ratio": ratio, "seed": seed}, {"ratio": ratio, "seed": seed, "stage2_steps": 0}
            levels = {"direct": 3 + 8 * ratio, "refit": 3 + 3.3 * ratio + (0.6 if seed and ratio > 0.5 else 0)}
            manual = {"method": "manual", "layers": "2,3"}
            points.append(point("direct", at, (levels["direct"],) * 2, settings={**NONE, **shared}))
            settings = {"transfer": "refit", **manual, **shared}
            points.append(point("refit", at, (levels["refit"],) * 2, settings=settings, repairing=90.0))
    return sweep("ratios", "Ratios", points, {"ratio": [0.2, 0.4, 0.6], "seed": list(splits)})
