"""Keeps the hidden states of a text on its way through a model, so that none is computed twice, whatever layers are
removed.

The state that enters layer i depends on the removed layers below i alone. So it is kept under the key (i, removed
layers below i), and a pass for another set of removed layers starts at the highest layer whose state is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from trsp_core.surgery import hooks
from trsp_core.surgery.stack import Stack

Key = tuple[int, frozenset[int]]


def key(layer: int, removed: frozenset[int]) -> Key:
    """The key of the state that enters `layer` when `removed` are gone."""
    return layer, frozenset(r for r in removed if r < layer)


class States:
    """The hidden states of one text.

    Args:
        ids: (B, T) token ids, on the model's device.
        wanted: called with a key; says whether its state is to be kept.

    Attributes:
        by_key: the hidden states (B, T, D) by key, the one that was used longest ago first.
    """

    def __init__(self, ids: Tensor, wanted: Callable[[Key], bool] = lambda key: True):
        self.ids, self.wanted = ids, wanted
        self.by_key: OrderedDict[Key, Tensor] = OrderedDict()

    def start(self, removed: frozenset[int], n_layers: int) -> int:
        """The highest layer whose entering state without `removed` is kept; L if it is what leaves the last layer, 0 if
        none is kept."""
        return next((i for i in range(n_layers, 0, -1) if key(i, removed) in self.by_key), 0)

    def climb(self, stack: Stack, removed: frozenset[int]) -> tuple[Tensor, int]:
        """What the model without `removed` puts out for the text, and how many layers were computed for that. States on
        the way are kept.

        The output is (B, T, V), logits; (B, T, D), hidden states, where the head is `head_loss.withheld`.
        """
        n_layers = len(stack.layers)
        first = self.start(removed, n_layers)
        instead: dict[int, Tensor] = {}
        if first:
            self.by_key.move_to_end(key(first, removed))
            instead[first - 1] = self.by_key[key(first, removed)]
        running = list(range(first, n_layers))
        skipped = hooks.skipped(stack, {*range(first), *removed}, instead)
        with torch.inference_mode(), skipped, hooks.tapped(stack, running) as taps:
            states = stack.model(input_ids=self.ids, use_cache=False).logits
            for i in running:
                self._keep(key(i, removed), taps[i][0])
                self._keep(key(i + 1, removed), taps[i][1])
        return states, len(set(running) - removed)

    def bound(self, most: int) -> None:
        """Forget states, those that were used longest ago first, until no more than `most` are kept. Those of the dense
        model always stay, so `most` has to leave room for them."""
        while len(self.by_key) > most:
            del self.by_key[next(k for k in self.by_key if k[1])]

    def forget(self, gone: Callable[[Key], bool]) -> None:
        """Forget each state for whose key `gone` is true."""
        for one in [k for k in self.by_key if gone(k)]:
            del self.by_key[one]

    def _keep(self, at: Key, state: Tensor) -> None:
        if at in self.by_key:  # it stays where it is: another thread may be on its way from there
            self.by_key.move_to_end(at)
        elif self.wanted(at):
            self.by_key[at] = state
