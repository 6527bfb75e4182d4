"""The losses of a text without each of some layers, asked round after round as a greedy search does. Nothing is
computed twice that still holds, and nothing that cannot change the choice; what this stands for is
`Lab.loss_without`.

1. A state on the way up holds until a layer below it goes (`states`): a candidate shares its way with all others up to
   its own layer, and from round to round up to the layer that was chosen last.
2. The loss over a part of the vocabulary is too low, since fewer exponentials are summed. So it is raised part by part,
   the likeliest tokens first, and only for candidates that are among the lowest still.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trsp_core.perf import head_loss, parallel, replicas
from trsp_core.perf.activation_cache import Key, States, key
from trsp_core.perf.budget import SEARCH_ROOM
from trsp_core.surgery.stack import Stack

AT_ONCE = 4096  # tokens of the vocabulary that a bound is raised by
LOWEST = 2  # losses that a choice is told with: the winner's and the runner-up's


class Scorer(Protocol):
    """What a search asks of a model under study: `Lab` is one."""

    stack: Stack
    device: torch.device
    projects: bool

    @property
    def n_layers(self) -> int: ...
    @property
    def model(self) -> nn.Module: ...
    def loss_given(self, states: Tensor, ids: Tensor) -> float:
        """L_LM on `ids` (B, T), from what a head that is `withheld` is given (B, T, D)."""
        ...

    def withheld(self, *models: nn.Module) -> AbstractContextManager[Any]:
        """Heads hand on what they are given."""
        ...


class Search:
    """One search.

    Args:
        batches: token ids (B, T); a loss is the mean over all of them.
        rounds: how many there will be. For one nothing is kept.

    Attributes:
        texts: hidden states that still hold, of each batch.
    """

    def __init__(self, lab: Scorer, batches: Sequence[Tensor], rounds: int):
        self._lab, self._rounds = lab, rounds
        self.texts = [States(ids, self._wanted) for ids in batches]
        self._removed: frozenset[int] = frozenset()
        self._every = lab.n_layers  # of a candidate's own states one in so many layers is kept
        self._vocabulary: Sequence[Tensor] = ()  # the likeliest tokens first
        tokens = sum(ids.numel() for ids in batches)
        self._shares = [ids.numel() / tokens for ids in batches]

    def losses(
        self, layers: Sequence[int], removed: Collection[int], bounds: bool = False
    ) -> Iterator[tuple[int, float]]:
        """`(i, L_LM without removed and i)` for each i of `layers`, a few at a time side by side.

        Args:
            bounds: tell lower bounds, and raise the lowest until the LOWEST of the last words are losses.
        """
        lab = self._lab
        dense = self._begin(frozenset(removed))
        if bounds and lab.projects and not self._vocabulary:
            with torch.inference_mode():
                self._vocabulary = head_loss.likeliest(lab.model, dense).split(AT_ONCE)
        parts = self._vocabulary if bounds else ()
        wide = parallel.lanes(lab.device, len(layers))
        stacks = [replicas.view(lab.stack) for _ in range(wide)]
        rising: dict[int, list[head_loss.Bound]] = {}

        @torch.inference_mode()
        def without(i: int, stack: Stack) -> float:
            states = [self._climb(text, stack, self._removed | {i}) for text in self.texts]
            pairs = [(x, text.ids) for x, text in zip(states, self.texts, strict=True)]
            if not parts:
                return self._mean([lab.loss_given(x, ids) for x, ids in pairs])
            rising[i] = [head_loss.Bound(lab.model, x, ids) for x, ids in pairs]
            return rise(i, parts[0])

        @torch.inference_mode()
        def rise(i: int, part: Tensor) -> float:
            for bound in rising[i]:
                bound.read(part)
            return self._mean([bound.nats for bound in rising[i]])

        def answers(tasks: dict[int, Callable[[], float]]) -> Iterator[tuple[int, float]]:
            losses.update(zip(tasks, parallel.run(list(tasks.values()), lab.device), strict=True))
            return ((i, losses[i]) for i in tasks)

        losses: dict[int, float] = {}
        for start in range(0, len(layers), wide):
            pairs = zip(layers[start : start + wide], stacks, strict=False)
            yield from answers({i: functools.partial(without, i, stack) for i, stack in pairs})
        read = dict.fromkeys(layers, 1)
        while parts:
            ranked = sorted(layers, key=lambda i: (math.isnan(losses[i]), losses[i]))
            if all(read[i] == len(parts) for i in ranked[:LOWEST]):
                break
            some = [i for i in ranked if read[i] < len(parts)][:wide]
            yield from answers({i: functools.partial(rise, i, parts[read[i]]) for i in some})
            for i in some:
                read[i] += 1

    def _begin(self, removed: frozenset[int]) -> Tensor:
        """A round without `removed`: what no longer holds is forgotten, the way that all candidates share is computed.
        What the head is given of the first text (B, T, D)."""
        self._removed = removed
        for text in self.texts:
            text.forget(lambda at: not key(at[0], removed)[1] <= at[1])
        dense = [self._climb(text, self._lab.stack, removed) for text in self.texts]
        if self._rounds > 1:
            state = sum(next(reversed(text.by_key.values())).nbytes for text in self.texts if text.by_key)
            # a candidate, a layer above it
            self._every = math.ceil(max(state, 1) * self._lab.n_layers**2 / 2 / SEARCH_ROOM)
        return dense[0]

    def _wanted(self, at: Key) -> bool:
        layer, below = at
        shared = below == key(layer, self._removed)[1]
        return layer < self._lab.n_layers and (shared or layer % self._every == 0)

    def _climb(self, text: States, stack: Stack, removed: frozenset[int]) -> Tensor:
        """What the head of a model without `removed` is given (B, T, D), or its logits where there is more to it."""
        with self._lab.withheld(stack.model):
            return text.climb(stack, removed)[0]

    def _mean(self, losses: Sequence[float]) -> float:
        return sum(share * loss for share, loss in zip(self._shares, losses, strict=True))
