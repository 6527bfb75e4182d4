"""A text's way through a model without some of its layers: hidden states that still hold are kept."""

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
    """Of one set on a text: mean nats a predicted token, mean KL from the dense model, layers that were computed."""

    loss: float
    kl: float
    layers_run: int


class Path:
    """A text's way through the layers, for any set of removed layers.

    Attributes:
        ids: (B, T) token ids, on the model's device.
        states: what was computed on the way.
    """

    def __init__(self, stack: Stack, ids: Tensor, most_bytes: int = STATE_BYTES):
        self.stack, self.ids, self.most_bytes = stack, ids, most_bytes
        self.states = States(ids)
        self._tried: dict[frozenset[int], Figures] = {}
        self._dense: DenseLogits | None = None

    def figures(self, removed: frozenset[int]) -> Figures:
        """Loss and KL without `removed`; the first call measures the dense model too."""
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
        return removed in self._tried

    def start(self, removed: frozenset[int]) -> int:
        """The highest layer whose entering state for this set is kept; 0 where none is."""
        return self.states.start(removed, len(self.stack.layers))

    def influence(self, layer: int) -> float:
        """1 - mean cosine of X_in and X_out of `layer` in the dense model."""
        self.figures(frozenset())
        states = [self.states.by_key[key(i, frozenset())] for i in (layer, layer + 1)]
        return float(1 - F.cosine_similarity(states[0], states[1], dim=-1).mean())

    @property
    def _targets(self) -> Tensor:
        return self.ids[:, 1:].flatten()

    def _refer(self) -> tuple[DenseLogits, int]:
        """What the dense model says, and how many layers were computed for it."""
        with head_loss.listening(self.stack.model) as head_inputs:
            logits, layers_run = self._logits(frozenset())
        return DenseLogits(
            self.stack.model, head_inputs[0][:, :-1].flatten(0, 1) if head_inputs else None, logits
        ), layers_run

    def _logits(self, removed: frozenset[int]) -> tuple[Tensor, int]:
        """What the model puts out at the N = B (T - 1) positions that predict a token, (N, V) where its head is not
        withheld, and how many layers were computed."""
        outputs, layers_run = self.states.climb(self.stack, removed)
        size = next(iter(self.states.by_key.values())).nbytes
        dense = len(self.stack.layers) + 1  # states of the dense model, which always stay
        self.states.bound(max(self.most_bytes // size, dense + 2))
        return outputs[:, :-1].flatten(0, 1), layers_run
