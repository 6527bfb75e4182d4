"""Random: layers drawn at random, the control that any method has to beat."""

from __future__ import annotations

import random

from trsp_core.pruning.methods import Method


def choose(lab, config, count):
    """K layers, drawn one by one from the candidates that are left; `config.seed` seeds the draws."""
    yield from ()
    draw = random.Random(config.seed)  # noqa: S311 - a reproducible draw, no secret
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(draw.choice(lab.candidates(config, chosen)))
    return chosen


METHOD = Method(
    name="random",
    title="Random",
    paper="",
    summary="Layers drawn at random, the control that any method has to beat.",
    choose=choose,
)
