"""The loss of predicting next tokens, and measures of how far two hidden states are apart."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from trsp_core.surgery import hooks
from trsp_core.surgery.stack import Stack


def similarity(a: Tensor, b: Tensor) -> float:
    """The cosine between hidden states a and b (B, T, D), in the mean over tokens."""
    with torch.inference_mode():
        return F.cosine_similarity(a.float(), b.float(), dim=-1).double().mean().item()


def states_at(stack: Stack, ids: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
    """The hidden states (B, T, D) of `ids` (B, T), by layer that they enter; L in `layers` asks for what leaves the
    last one."""
    top = len(stack.layers) - 1
    with hooks.tapped(stack, sorted({min(i, top) for i in layers})) as taps:
        stack.model(input_ids=ids, use_cache=False)
        return {i: taps[top][1] if i > top else taps[i][0] for i in layers}


def relative_distance(target: Tensor, states: Tensor) -> Tensor:
    """|states - target| / |target| in the mean over tokens, a scalar, from hidden states (B, T, D). Gradients flow into
    `states` alone."""
    target = target.detach().float()
    return ((states.float() - target).norm(dim=-1) / target.norm(dim=-1).clamp(min=1e-6)).mean()


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss of each predicted token in nats, (B, T - 1), from logits (B, T, V) and the text's token ids (B, T)."""
    following = ids.roll(-1, dims=1)  # moving the ids, not the logits, spares a copy of the largest tensor there is
    losses = F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="none")
    return losses.view(ids.shape)[:, :-1]
