"""The loss of a text and its divergence from a reference, without ever holding all its logits.

The last projection is taken in slices of the vocabulary: a slice is small enough to be read again while it is near.
Where a model does more than project (scale or cap its logits), its own logits are used whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLICE = 1024  # tokens of the vocabulary at once


def head_of(model: nn.Module) -> nn.Linear | None:
    """The model's last projection, where it is a plain one."""
    outer: Any = model
    head = outer.get_output_embeddings()
    return head if type(head) is nn.Linear else None


@contextlib.contextmanager
def listening(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets what the head is given, (B, T, D); empty where there is no plain head."""
    given: list[Tensor] = []
    head = head_of(model)
    hook = head.register_forward_pre_hook(lambda _, args: given.append(args[0])) if head is not None else None
    try:
        yield given
    finally:
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def withheld(model: nn.Module) -> Iterator[list[Tensor]]:
    """The head computes nothing inside; a list gets what it was given, (B, T, D)."""
    given: list[Tensor] = []
    head = head_of(model)
    assert head is not None

    def hand_on(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden[..., :1]

    head.forward = hand_on  # type: ignore[method-assign]
    try:
        yield given
    finally:
        del head.forward


class Reference:
    """What a model says at N places: the probabilities that others are compared with.

    Args:
        states: (N, D), what the head was given; None where the head is no plain projection.
        logits: (N, V), what the model made of them.

    Attributes:
        plain: the logits are the head's projection and nothing else, so that slices of it will do.
        dense: `states` where plain, else `logits`: what `compare` takes.
    """

    def __init__(self, model: nn.Module, states: Tensor | None, logits: Tensor):
        self._head = head_of(model)
        with torch.inference_mode():
            self.plain = states is not None and self._head is not None and _projects(self._head, states, logits)
            self.dense = states if self.plain and states is not None else logits
            logs = torch.log_softmax(logits.float(), dim=-1)
            p = logs.exp()
            self._p_log_p = torch.stack([(a * b).sum(-1) for a, b in zip(_sliced(p), _sliced(logs), strict=True)]).sum(
                0
            )
            self._p = [part.contiguous() for part in _sliced(p)]

    def compare(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of each of the `targets` (N,), and KL from the reference at each place (N,), of a model.

        Args:
            states: what its head is given (N, D) where `plain`, else its logits (N, V).
        """
        with torch.inference_mode():
            norms, expected = [], torch.zeros(len(targets), device=states.device)
            room = torch.empty_like(self._p[0])
            for part, p in zip(self._parts(states), self._p, strict=True):
                norms.append(torch.logsumexp(part, dim=-1))
                # adds in a tree: a dot product would lose the long tail
                expected += torch.mul(p, part, out=room[:, : p.shape[1]]).sum(-1)
            norm = torch.stack(norms).logsumexp(0)
            return (norm - self._at(states, targets)).double(), (self._p_log_p - expected + norm).double()

    def _parts(self, states: Tensor) -> Iterator[Tensor]:
        """Logits (N, up to SLICE), slice by slice; each is written over the one before, which is still near."""
        if not self.plain or self._head is None:
            yield from (part.float() for part in _sliced(states))
            return
        biases = self._head.bias.split(SLICE) if self._head.bias is not None else None
        room = states.new_empty(len(states), SLICE)
        for n, weights in enumerate(self._head.weight.split(SLICE)):
            part = torch.mm(states, weights.T, out=room[:, : len(weights)])
            yield (part.add_(biases[n]) if biases else part).float()

    def _at(self, states: Tensor, targets: Tensor) -> Tensor:
        """Logits (N,) of `targets`."""
        if not self.plain or self._head is None:
            return states.gather(1, targets[:, None]).squeeze(1).float()
        found = (states * self._head.weight[targets]).sum(-1).float()
        return found if self._head.bias is None else found + self._head.bias[targets].float()


def _projects(head: nn.Linear, states: Tensor, logits: Tensor) -> bool:
    """Whether `logits` (N, V) are the plain projection of `states` (N, D), by some of the rows."""
    rows = min(8, len(states))
    return torch.allclose(F.linear(states[:rows], head.weight, head.bias).float(), logits[:rows].float(), 1e-4, 1e-4)


def _sliced(table: Tensor) -> tuple[Tensor, ...]:
    return table.split(SLICE, dim=-1)
