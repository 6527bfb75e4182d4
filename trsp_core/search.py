"""The losses of a text without each of some layers, asked round after round as a greedy search does. Nothing is
computed twice that still holds, and nothing that cannot change the choice; what this stands for is
`Lab.loss_without`.

1. The way up to a layer is the same for all candidates that lie above it: it is computed once a round.
2. A candidate's own way, up to the layer that was chosen last, is what it was: the candidate goes on from there.
3. The loss over a part of the vocabulary is too low, since fewer exponentials are summed. So it is raised part by part,
   the likeliest tokens first, and only for candidates that are among the lowest still.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trsp_core import abreast, heads, surgery, views
from trsp_core.methods import SEARCH_ROOM
from trsp_core.surgery import Stack

if TYPE_CHECKING:
    from trsp_core.lab import Lab

AT_ONCE = 4096  # tokens of the vocabulary that a bound is raised by
LOWEST = 2  # losses that a choice is told with: the winner's and the runner-up's

Ways = dict[int | None, dict[int, Tensor]]  # by candidate, and None for none: what enters some layers (B, T, D)


class Search:
    """One search.

    Args:
        batches: token ids (B, T); a loss is the mean over all of them.
        rounds: how many there will be. For one nothing is kept.
    """

    def __init__(self, lab: Lab, batches: Sequence[Tensor], rounds: int):
        self._lab, self._batches = lab, list(batches)
        self._ways: list[Ways] = [{} for _ in batches]
        self._removed: set[int] = set()
        self._vocabulary: Sequence[Tensor] = ()  # the likeliest tokens first
        tokens = sum(ids.numel() for ids in batches)
        self._shares = [ids.numel() / tokens for ids in batches]
        self._rounds, self._every = rounds, lab.n_layers  # of the layers' states one in so many is kept

    def losses(
        self, layers: Sequence[int], removed: Collection[int], bounds: bool = False
    ) -> Iterator[tuple[int, float]]:
        """`(i, L_LM without removed and i)` for each i of `layers`, a few at a time side by side.

        Args:
            bounds: tell lower bounds, and raise the lowest until the LOWEST of the last words are losses.
        """
        lab, batches = self._lab, self._batches
        self._drop(set(removed))
        dense = [self._climb(lab.stack, ways, None, ids) for ids, ways in zip(batches, self._ways, strict=True)]
        if self._rounds > 1:
            state = sum(x.nbytes for ways in self._ways for x in list(ways[None].values())[-1:])
            self._every = math.ceil(max(state, 1) * lab.n_layers**2 / 2 / SEARCH_ROOM)  # a candidate, a layer above it
        if bounds and lab.projects and not self._vocabulary:
            with torch.inference_mode():
                self._vocabulary = heads.likeliest(lab.model, dense[0]).split(AT_ONCE)
        parts = self._vocabulary if bounds else ()
        wide = abreast.lanes(lab.device, len(layers))
        stacks = [views.view(lab.stack) for _ in range(wide)]
        rising: dict[int, list[heads.Bound]] = {}

        @torch.inference_mode()
        def without(i: int, stack: Stack) -> float:
            given = [self._climb(stack, ways, i, ids) for ids, ways in zip(batches, self._ways, strict=True)]
            if not parts:
                return self._mean([lab.loss_given(x, ids) for x, ids in zip(given, batches, strict=True)])
            rising[i] = [heads.Bound(lab.model, x, ids) for x, ids in zip(given, batches, strict=True)]
            return rise(i, parts[0])

        @torch.inference_mode()
        def rise(i: int, part: Tensor) -> float:
            for bound in rising[i]:
                bound.read(part)
            return self._mean([bound.nats for bound in rising[i]])

        def answers(tasks: dict[int, Callable[[], float]]) -> Iterator[tuple[int, float]]:
            told.update(zip(tasks, abreast.run(list(tasks.values()), lab.device), strict=True))
            return ((i, told[i]) for i in tasks)

        told: dict[int, float] = {}
        for start in range(0, len(layers), wide):
            pairs = zip(layers[start : start + wide], stacks, strict=False)
            yield from answers({i: functools.partial(without, i, stack) for i, stack in pairs})
        read = dict.fromkeys(layers, 1)
        while parts:
            ranked = sorted(layers, key=lambda i: (math.isnan(told[i]), told[i]))
            if all(read[i] == len(parts) for i in ranked[:LOWEST]):
                break
            some = [i for i in ranked if read[i] < len(parts)][:wide]
            yield from answers({i: functools.partial(rise, i, parts[read[i]]) for i in some})
            for i in some:
                read[i] += 1

    def _drop(self, removed: set[int]) -> None:
        """Forget what no longer holds: what enters layers above the lowest one that has come or gone."""
        lowest = min(removed ^ self._removed, default=self._lab.n_layers)
        for ways in self._ways:
            for i in ways:
                ways[i] = {} if i in removed else {j: x for j, x in ways[i].items() if j <= lowest}
        self._removed = removed

    @torch.inference_mode()
    def _climb(self, stack: Stack, ways: Ways, i: int | None, ids: Tensor) -> Tensor:
        """What the head of a model without layer i and those removed is given (B, T, D), or its logits where there is
        more to it. The way begins at the highest state that holds, and leaves some to go on from."""
        own = ways.setdefault(i, {})
        shared = {j: x for j, x in ways.get(None, {}).items() if i is None or j <= i}
        start, state = max({0: None, **shared, **own}.items())
        every = self._every if i is not None else 1
        above = [j for j in range(max(start, -1 if i is None else i) + 1, self._lab.n_layers) if j % every == 0]
        gone = {*range(start), *self._removed} | ({i} if i is not None else set())
        held = surgery.skipped(stack, gone, {start - 1: state} if state is not None else {})
        with held, surgery.tapped(stack, above) as taps, self._lab.withheld(stack.model):
            given = stack.model(input_ids=ids, use_cache=False).logits
            own.update({j: taps[j][0] for j in above})
            return given

    def _mean(self, losses: Sequence[float]) -> float:
        return sum(share * loss for share, loss in zip(self._shares, losses, strict=True))
