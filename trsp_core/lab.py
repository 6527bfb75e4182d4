"""The verbs that a method may use on a model: losses, gates, skips, gaps, steps. Methods touch models through this
alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trsp_core import data, surgery
from trsp_core.config import RunConfig
from trsp_core.errors import TrspError
from trsp_core.surgery import Stack

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Lab:
    """A model under study, with its calibration blocks.

    Attributes:
        stack: the model and its L layers.
        blocks: (N, T) token ids to calibrate on, on the CPU.
        device: where the model's input goes.
    """

    def __init__(self, stack: Stack, blocks: Tensor, config: RunConfig):
        self.stack, self.blocks, self.config = stack, blocks, config
        self.device = next(stack.model.parameters()).device

    @property
    def n_layers(self) -> int:
        return len(self.stack.layers)

    @property
    def model(self) -> nn.Module:
        return self.stack.model

    def unprotected(self, config: RunConfig) -> list[int]:
        """Layers outside the protected ends."""
        return list(range(config.protect_first, self.n_layers - config.protect_last))

    def candidates(self, config: RunConfig, chosen: Collection[int]) -> list[int]:
        """Layers that may be chosen next."""
        near = {i + d for i in chosen for d in (-1, 0, 1)} if config.no_neighbours else set(chosen)
        return [i for i in self.unprotected(config) if i not in near]

    def batches(self, steps: int, seed: int) -> Iterator[Tensor]:
        """`steps` batches (B, T) of the calibration blocks; the same for the same seed."""
        for indices in data.order(len(self.blocks), self.config.batch_blocks, steps, seed):
            yield self.blocks[indices].to(self.device)

    def lm_loss(self, ids: Tensor) -> Tensor:
        """L_LM: mean nats per predicted token of `ids` (B, T)."""
        logits = self.model(input_ids=ids, use_cache=False).logits
        return next_token_loss(logits, ids).mean()

    def gated(self, weights: Tensor, kind: str, layers: Collection[int]) -> AbstractContextManager[None]:
        return surgery.gated(self.stack, weights, kind, layers)

    def skipped(self, layers: Collection[int]) -> AbstractContextManager[None]:
        return surgery.skipped(self.stack, layers)

    def tapped(self, layers: Sequence[int]) -> AbstractContextManager[dict[int, tuple[Tensor, Tensor]]]:
        return surgery.tapped(self.stack, layers)

    @contextlib.contextmanager
    def learning(self, parameters: Collection[nn.Parameter]) -> Iterator[None]:
        """Only `parameters` of the model learn inside."""
        with surgery.learning(self.model, parameters):
            yield

    def loss_without(self, layers: Collection[int], ids: Tensor) -> float:
        """L_LM on `ids` (B, T) with `layers` skipped."""
        with torch.inference_mode(), self.skipped(layers):
            return self.lm_loss(ids).item()

    def fit(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor], Tensor],
        steps: int,
        seed: int,
        stage: str,
        before: Callable[[int], None] | None = None,
        after: Callable[[], None] | None = None,
        first: int = 1,
    ) -> Iterator[int]:
        """Take `steps` optimiser steps and yield the number of each after it; nothing is held open at a yield.

        Args:
            loss: of a batch (B, T): the scalar to step down. It may call backward on parts of its own before.
            stage: named in the error.
            before: called with the step's number before it, to set rates.
            after: called after each step, to project parameters.
            first: number of the first step.

        Raises:
            TrspError: the loss is not a finite number; names the step.
        """
        for step, ids in enumerate(self.batches(steps, seed), first):
            if before:
                before(step)
            with torch.enable_grad():
                value = loss(ids)
                if not torch.isfinite(value):
                    raise TrspError(
                        f"The loss is no longer a finite number at step {step} of {stage}.",
                        "Lower the learning rate, or the penalty, and start again; what was recorded is kept.",
                    )
                value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # their memory is free for what happens at the yield
            if after:
                with torch.no_grad():
                    after()
            yield step


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats of each predicted token: (B, T - 1) from logits (B, T, V) and ids (B, T)."""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return flat.view(ids.shape[0], -1)
