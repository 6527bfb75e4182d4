"""Losses of next tokens, and how far hidden states are apart."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from trsp_core.surgery import hooks
from trsp_core.surgery.stack import Stack

if TYPE_CHECKING:
    pass


def similarity(a: Tensor, b: Tensor) -> float:
    """Mean over tokens of the cosine between hidden states a and b (B, T, D)."""
    with torch.inference_mode():
        return F.cosine_similarity(a.float(), b.float(), dim=-1).double().mean().item()


def states_at(stack: Stack, ids: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
    """What enters each layer of `layers` (B, T, D) on `ids` (B, T); L stands for what leaves the last layer."""
    top = len(stack.layers) - 1
    with hooks.tapped(stack, sorted({min(i, top) for i in layers})) as taps:
        stack.model(input_ids=ids, use_cache=False)
        return {i: taps[top][1] if i > top else taps[i][0] for i in layers}


def relative_distance(target: Tensor, states: Tensor) -> Tensor:
    """Mean over tokens of |states - target| / |target|, from hidden states (B, T, D); `target` is detached."""
    target = target.detach().float()
    return ((states.float() - target).norm(dim=-1) / target.norm(dim=-1).clamp(min=1e-6)).mean()


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats of each predicted token: (B, T - 1) from logits (B, T, V) and ids (B, T)."""
    following = ids.roll(-1, dims=1)  # moving the ids, not the logits, spares a copy of the largest tensor there is
    losses = F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="none")
    return losses.view(ids.shape)[:, :-1]
