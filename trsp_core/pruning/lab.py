"""The lab: all that a method of choosing or a repair does with a model. It offers losses, hidden states, gates, skips
and training steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from trsp_core.data import blocks as data
from trsp_core.errors import TrspError
from trsp_core.perf.optimizer_in_backward import EagerAdamW
from trsp_core.perf.removal_search import Search
from trsp_core.schema.config import RunConfig
from trsp_core.surgery import hooks, removal, training
from trsp_core.surgery.stack import Stack
from trsp_core.training.checkpointing import Rounds, Solutions
from trsp_core.training.passes import Passes
from trsp_core.training.steering import Steering


class Lab(Passes):
    """A model under study, with its calibration blocks. Losses (`lm_loss`, `gate_loss`, `taught_loss`) and contexts
    (`gated`, `skipped`, `tapped`, `learning`, `stepping`) come from `Passes`.

    Attributes:
        blocks: (N, T) token ids to calibrate on, on the CPU.
        gone: layers that earlier cycles have chosen; they cannot be chosen again.
        layer_weights: what the choice has learned to weigh each layer with, (L,); [] of a method that learns none.
        rounds: keeps where stage 1 stands after each round, so that a run that breaks off can be resumed.
        solutions: keeps what a repair has solved for, for the same end.
        edits: the new weights that the repair at work has found so far, by parameter.
        steering: the settings that may be turned while the steps are taken.
    """

    def __init__(self, stack: Stack, blocks: Tensor, config: RunConfig):
        super().__init__(stack, config, blocks[:1, :8])
        self.blocks = blocks
        self.gone: list[int] = []
        self.layer_weights: list[float] = []
        self.rounds, self.solutions, self.steering = Rounds(), Solutions(), Steering()
        self.edits: dict[nn.Parameter, Tensor] = {}

    def unprotected(self, config: RunConfig) -> list[int]:
        """The layers that may be removed: not protected, not gone, and not among those that their family needs."""
        free = range(config.protect_first, self.n_layers - config.protect_last)
        return [i for i in free if i not in self.gone and i not in self.stack.family.stays]

    def spans(self, config: RunConfig, count: int, lowest: int = 0) -> list[int]:
        """The layers at which `count` neighbouring ones may begin, all of them removable and none below `lowest`."""
        first, end = max(config.protect_first, lowest), self.n_layers - config.protect_last
        stays = set(self.stack.family.stays)
        return [i for i in range(first, end - count + 1) if not stays & set(range(i, i + count))]

    def candidates(self, config: RunConfig, chosen: Collection[int]) -> list[int]:
        """The layers that may be chosen next, where `chosen` are already; without their neighbours if so configured."""
        removed = {*chosen, *self.gone}
        near = {i + d for i in removed for d in (-1, 0, 1)} if config.no_neighbours else removed
        return [i for i in self.unprotected(config) if i not in near]

    def batches(self, steps: int | Callable[[], int], seed: int, skip: int = 0) -> Iterator[Tensor]:
        """`steps` batches (B, T) of the calibration blocks in the seed's order, after its first `skip`."""
        order = itertools.islice(data.order(len(self.blocks), self.config.batch_blocks, seed), skip, None)
        for number, indices in enumerate(order):
            if number >= (steps() if callable(steps) else steps):  # a number of steps that may change meanwhile
                return
            yield self.blocks[indices].to(self.device)

    def sample(self, config: RunConfig) -> list[Tensor]:
        """Batches (B, T) of the first `config.score_blocks` calibration blocks: what scores are taken on."""
        return [ids.to(self.device) for ids in self.blocks[: config.score_blocks].split(config.batch_blocks)]

    def pool(self) -> list[Tensor]:
        """Batches (B, T) of all calibration blocks."""
        return [ids.to(self.device) for ids in self.blocks.split(self.config.batch_blocks)]

    def states(self, ids: Tensor) -> list[Tensor]:
        """The L + 1 hidden states (B, T, D) of `ids` (B, T): what enters each layer, and what leaves the last."""
        with torch.inference_mode(), self.withheld(self.model), self.tapped(range(self.n_layers)) as taps:
            self.model(input_ids=ids, use_cache=False)
            return [taps[0][0], *(taps[i][1] for i in range(self.n_layers))]

    def last_state(self, ids: Tensor, layer: int, entering: Tensor) -> Tensor:
        """What leaves the last layer (B, T, D), given the state (B, T, D) that enters `layer`; none below it runs."""
        below = range(layer)
        instead = {layer - 1: entering} if layer else {}
        top = self.n_layers - 1
        above = hooks.skipped(self.stack, below, instead)
        with torch.inference_mode(), self.withheld(self.model), above, self.tapped([top]) as taps:
            self.model(input_ids=ids, use_cache=False)
            return taps[top][1]

    def entering(self, layer: int, ids: Tensor) -> Tensor:
        """What enters layer `layer` (B, T, D) for `ids` (B, T); only the layers below it run."""
        above = range(layer, self.n_layers)
        with torch.inference_mode(), self.withheld(self.model), self.skipped(above), self.tapped([layer]) as taps:
            self.model(input_ids=ids, use_cache=False)
            return taps[layer][0]

    def leaving(self, layer: int, ids: Tensor, entering: Tensor, learns: bool = False) -> Tensor:
        """What leaves layer `layer` (B, T, D) for `ids` (B, T), given the state (B, T, D) that enters it; no other
        layer runs. With gradients if it `learns`."""
        others = [i for i in range(self.n_layers) if i != layer]
        alone = hooks.skipped(self.stack, others, {layer - 1: entering} if layer else {})
        with torch.inference_mode(not learns), self.withheld(self.model), alone, self.tapped([layer]) as taps:
            self.model(input_ids=ids, use_cache=False)
            return taps[layer][1]

    def matrices(self, layer: int) -> list[nn.Parameter]:
        """The weight matrices of layer `layer`; biases and norms are left out."""
        return [p for p in self.stack.layers[layer].parameters() if p.dim() > 1]

    def add_gradient(self, ids: Tensor, share: float) -> None:
        """Add `share` of the gradient of L_LM on `ids` (B, T) to the `grad` of the parameters that are `learning`."""
        with torch.enable_grad():
            (share * self.lm_loss(ids)).backward()

    def rewritten(self, edits: Mapping[nn.Parameter, Tensor]) -> AbstractContextManager[None]:
        return training.rewritten(edits)

    def narrowed(self, layers: Sequence[nn.Module], entries: Mapping[str, int]) -> AbstractContextManager[nn.Module]:
        return removal.narrowed(self.stack, layers, entries)

    def heard(self, module: nn.Module) -> AbstractContextManager[list[tuple[Tensor, Tensor]]]:
        return hooks.heard(module)

    def loss_without(self, layers: Collection[int], ids: Tensor) -> float:
        """L_LM on `ids` (B, T), in nats a predicted token, with `layers` skipped."""
        with torch.inference_mode(), self.skipped(layers), self.withheld(self.model):
            return self.loss_given(self.model(input_ids=ids, use_cache=False).logits, ids)

    def search(self, batches: Sequence[Tensor], rounds: int = 1) -> Search:
        """A greedy search over `rounds` rounds, which gives the loss of `batches` (B, T) without each layer."""
        return Search(self, batches, rounds)

    def fit(
        self,
        optimizer: torch.optim.Optimizer | EagerAdamW,
        loss: Callable[[Tensor], Tensor],
        steps: int | Callable[[], int],
        seed: int,
        stage: str,
        before: Callable[[int], None] | None = None,
        after: Callable[[], None] | None = None,
        first: int = 1,
        skip: int = 0,
    ) -> Iterator[int]:
        """Take `steps` optimiser steps, and yield the number of each after it. No gradient mode is open at a yield.

        Args:
            optimizer: one of torch, or an `EagerAdamW` in its `stepping`.
            loss: gives the scalar to minimise on a batch (B, T). It may have called backward on parts of it already; on
                all of it, and then it returns a scalar without a graph.
            stage: what the error calls this training.
            before: called before each step with its number, to set rates.
            after: called after each step, without gradients, to project parameters.
            first: number of the first step.
            skip: how many batches of the seed's order are left out at its beginning.

        Raises:
            TrspError: the loss is not a finite number; the message names the step.
        """
        for step, ids in enumerate(self.batches(steps, seed, skip), first):
            if before:
                before(step)
            with torch.enable_grad():
                value = loss(ids)
                if not torch.isfinite(value):
                    raise TrspError(
                        f"The loss is no longer a finite number at step {step} of {stage}.",
                        "Lower the learning rate, or the penalty, and start again; what was recorded is kept.",
                    )
                if value.requires_grad:
                    value.backward()
                del value  # what is recorded (`cuda_graphs`) may meet nothing of an earlier pass
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # their memory is free for what happens at the yield
            if after:
                with torch.no_grad():
                    after()
            yield step
