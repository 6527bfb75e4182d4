"""Measures a text's loss without any set of layers, and keeps the hidden states that other sets can use."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from trsp_core.perf import head_loss
from trsp_core.perf.activation_cache import States, key
from trsp_core.perf.head_loss import DenseLogits
from trsp_core.surgery.stack import Stack

STATE_BYTES = 600_000_000  # of kept hidden states, over both domains


@dataclass(frozen=True)
class Figures:
    """What was measured of the model without one set of layers.

    Attributes:
        loss: mean nats a predicted token.
        kl: mean KL(dense, model), in nats a predicted token.
        layers_run: how many layers had to be computed for it.
    """

    loss: float
    kl: float
    layers_run: int


class Path:
    """A text and what a model makes of it, for any set of removed layers.

    Args:
        most_bytes: of the hidden states that are kept; those of the dense model are kept in any case.

    Attributes:
        ids: (B, T) token ids, on the model's device.
        states: the hidden states that are kept.
    """

    def __init__(self, stack: Stack, ids: Tensor, most_bytes: int = STATE_BYTES):
        self.stack, self.ids, self.most_bytes = stack, ids, most_bytes
        self.states = States(ids)
        self._tried: dict[frozenset[int], Figures] = {}
        self._dense: DenseLogits | None = None

    def figures(self, removed: frozenset[int]) -> Figures:
        """Loss and KL without the layers `removed`. The first call measures the dense model too; a set that was asked
        for before is not measured again."""
        if self._dense is None:
            self._dense, layers_run = self._refer()
            self._tried[frozenset()] = self._compared(self._dense, self._dense.dense, layers_run)
        if removed not in self._tried:
            with head_loss.withheld(self.stack.model) if self._dense.plain else nullcontext() as head_inputs:
                logits, layers_run = self._logits(removed)
            states = logits if head_inputs is None else head_inputs[0][:, :-1].flatten(0, 1)
            self._tried[removed] = self._compared(self._dense, states, layers_run)
        return self._tried[removed]

    def _compared(self, dense: DenseLogits, states: Tensor, layers_run: int) -> Figures:
        loss, kl = (x.mean().item() for x in dense.compare(states, self._targets))
        return Figures(loss, max(kl, 0.0), layers_run)

    def known(self, removed: frozenset[int]) -> bool:
        """Whether this set has been measured."""
        return removed in self._tried

    def start(self, removed: frozenset[int]) -> int:
        """The layer from which on this set would have to be computed; 0 where no state of it is kept."""
        return self.states.start(removed, len(self.stack.layers))

    def influence(self, layer: int) -> float:
        """The block influence of `layer` in the dense model: 1 - mean cosine of X_in and X_out (ShortGPT,
        arXiv:2403.03853)."""
        self.figures(frozenset())
        states = [self.states.by_key[key(i, frozenset())] for i in (layer, layer + 1)]
        return float(1 - F.cosine_similarity(states[0], states[1], dim=-1).mean())

    @property
    def _targets(self) -> Tensor:
        return self.ids[:, 1:].flatten()

    def _refer(self) -> tuple[DenseLogits, int]:
        """The dense model's probabilities, and how many layers were computed for them."""
        with head_loss.listening(self.stack.model) as head_inputs:
            logits, layers_run = self._logits(frozenset())
        return DenseLogits(
            self.stack.model, head_inputs[0][:, :-1].flatten(0, 1) if head_inputs else None, logits
        ), layers_run

    def _logits(self, removed: frozenset[int]) -> tuple[Tensor, int]:
        """What the model puts out at the N = B (T - 1) positions that predict a token, and how many layers were
        computed for it: logits (N, V), or hidden states (N, D) where the head is `withheld`."""
        outputs, layers_run = self.states.climb(self.stack, removed)
        size = next(iter(self.states.by_key.values())).nbytes
        dense = len(self.stack.layers) + 1  # states of the dense model, which always stay
        self.states.bound(max(self.most_bytes // size, dense + 2))
        return outputs[:, :-1].flatten(0, 1), layers_run
