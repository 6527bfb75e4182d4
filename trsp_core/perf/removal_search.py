"""Computes the losses of a text without each of some layers, round after round, as a greedy search asks for them. The
plain form of each is `Lab.loss_without`. Two things make it faster:

1. No hidden state is computed twice (`activation_cache`). Up to its own layer, a candidate shares its states with all
   other candidates; up to the layer that was chosen last, with the round before.
2. A loss is computed only as far as the choice needs it. Over a part of the vocabulary it is too low, since fewer
   exponentials are summed (`head_loss.Bound`). It is raised part by part, the likeliest tokens first, and only for
   candidates that are still among the lowest.
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
LOWEST = 2  # how many losses have to be exact: the winner's and the runner-up's, which the event of a choice tells


class Scorer(Protocol):
    """What a search needs of a model under study; `Lab` is one. Its members are those of `training.passes.Passes`."""

    stack: Stack
    device: torch.device
    projects: bool

    @property
    def n_layers(self) -> int: ...
    @property
    def model(self) -> nn.Module: ...
    def loss_given(self, states: Tensor, ids: Tensor) -> float:
        """L_LM on `ids` (B, T), from what the model returns inside `withheld`: see `Passes.loss_given`."""
        ...

    def withheld(self, *models: nn.Module) -> AbstractContextManager[Any]:
        """Inside, heads return what they are given: see `Passes.withheld`."""
        ...


class Search:
    """One greedy search.

    Args:
        batches: token ids (B, T) each; a loss is the mean over all of their tokens.
        rounds: how many rounds there will be.

    Attributes:
        texts: the hidden states of each batch that can still be used.
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
        """Yield `(i, loss)` for each i of `layers`: L_LM, in nats a predicted token, without `removed` and i.

        Args:
            bounds: yield lower bounds first, and then again and again a higher one for a layer, until the `LOWEST`
                smallest are exact losses. The last one that is yielded for a layer counts.
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
        """Begin a round without `removed`: forget states that no longer hold, and compute those that all candidates
        share. Returns what the head is given for the first batch (B, T, D), or logits where there is more to it."""
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
        """Whether to keep the state with the key `at`: if all candidates share it, or if its layer is one in
        `_every`."""
        layer, below = at
        shared = below == key(layer, self._removed)[1]
        return layer < self._lab.n_layers and (shared or layer % self._every == 0)

    def _climb(self, text: States, stack: Stack, removed: frozenset[int]) -> Tensor:
        """What the head is given for a batch when the layers `removed` are gone (B, T, D); logits (B, T, V) where they
        are more than its projection."""
        with self._lab.withheld(stack.model):
            return text.climb(stack, removed)[0]

    def _mean(self, losses: Sequence[float]) -> float:
        """The mean over all tokens, from the mean of each batch."""
        return sum(share * loss for share, loss in zip(self._shares, losses, strict=True))
