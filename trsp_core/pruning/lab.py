"""The verbs that a method may use on a model: losses, gates, skips, gaps, steps. Methods touch models through this
alone."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trsp_core.data import blocks as data
from trsp_core.errors import TrspError
from trsp_core.evaluation.losses import next_token_loss, relative_distance, states_at
from trsp_core.perf import budget, compilation, cuda_graphs, head_loss, parallel, replicas
from trsp_core.perf.optimizer_in_backward import EagerAdamW
from trsp_core.perf.removal_search import Search
from trsp_core.pruning.checkpointing import Rounds
from trsp_core.schema.config import RunConfig
from trsp_core.surgery import hooks, removal, training
from trsp_core.surgery.stack import Stack

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

Opened = TypeVar("Opened")


class Lab:
    """A model under study, with its calibration blocks.

    Attributes:
        stack: the model and its L layers.
        blocks: (N, T) token ids to calibrate on, on the CPU.
        device: where the model's input goes.
        teacher: a copy of the dense model, for `taught_loss`; None where nothing is distilled.
        gone: layers chosen in earlier cycles; they are skipped, and no candidates any more.
        rounds: where stage 1 stands after each round, for a run that may break off.
        projects: the logits are a plain projection, so that losses need not hold them all.
    """

    def __init__(self, stack: Stack, blocks: Tensor, config: RunConfig):
        self.stack, self.blocks, self.config = stack, blocks, config
        self.device = next(stack.model.parameters()).device
        self.teacher: Stack | None = None
        self.gone: list[int] = []
        self.rounds = Rounds()
        self.projects = head_loss.projects(stack.model, blocks[:1, :8].to(self.device))
        self._slopes: head_loss.Slopes = head_loss.slopes
        self._open: list[object] = []  # a mark for each context that changes what a pass does
        self._recorded: tuple[list[object], cuda_graphs.Recorded] | None = None

    @property
    def n_layers(self) -> int:
        return len(self.stack.layers)

    @property
    def model(self) -> nn.Module:
        return self.stack.model

    def unprotected(self, config: RunConfig) -> list[int]:
        """Layers outside the protected ends that are not gone, and may go at all."""
        free = range(config.protect_first, self.n_layers - config.protect_last)
        return [i for i in free if i not in self.gone and i not in self.stack.family.stays]

    def spans(self, config: RunConfig, count: int, lowest: int = 0) -> list[int]:
        """Where a run of `count` neighbouring layers may begin, all of it unprotected and from layer `lowest` up."""
        first, end = max(config.protect_first, lowest), self.n_layers - config.protect_last
        stays = set(self.stack.family.stays)
        return [i for i in range(first, end - count + 1) if not stays & set(range(i, i + count))]

    def candidates(self, config: RunConfig, chosen: Collection[int]) -> list[int]:
        """Layers that may be chosen next."""
        taken = {*chosen, *self.gone}
        near = {i + d for i in taken for d in (-1, 0, 1)} if config.no_neighbours else taken
        return [i for i in self.unprotected(config) if i not in near]

    def batches(self, steps: int, seed: int, skip: int = 0) -> Iterator[Tensor]:
        """`steps` batches (B, T) of the calibration blocks, after the first `skip`; the same for the same seed."""
        for indices in data.order(len(self.blocks), self.config.batch_blocks, skip + steps, seed)[skip:]:
            yield self.blocks[indices].to(self.device)

    def sample(self, config: RunConfig) -> list[Tensor]:
        """Batches (B, T) of the first `config.score_blocks` calibration blocks: what scores are taken on."""
        return [ids.to(self.device) for ids in self.blocks[: config.score_blocks].split(config.batch_blocks)]

    def pool(self) -> list[Tensor]:
        """Batches (B, T) of all calibration blocks."""
        return [ids.to(self.device) for ids in self.blocks.split(self.config.batch_blocks)]

    def states(self, ids: Tensor) -> list[Tensor]:
        """The L + 1 hidden states (B, T, D) of `ids` (B, T): what enters each layer, and what leaves the last."""
        with torch.inference_mode(), self.tapped(range(self.n_layers)) as taps:
            self.model(input_ids=ids, use_cache=False)
            return [taps[0][0], *(taps[i][1] for i in range(self.n_layers))]

    def last_state(self, ids: Tensor, layer: int, entering: Tensor) -> Tensor:
        """What leaves the last layer (B, T, D), computed from `layer` on, given the state (B, T, D) that enters it."""
        below = range(layer)
        instead = {layer - 1: entering} if layer else {}
        top = self.n_layers - 1
        with torch.inference_mode(), hooks.skipped(self.stack, below, instead), self.tapped([top]) as taps:
            self.model(input_ids=ids, use_cache=False)
            return taps[top][1]

    def matrices(self, layer: int) -> list[nn.Parameter]:
        """The weight matrices of a layer; biases and norms are left out."""
        return [p for p in self.stack.layers[layer].parameters() if p.dim() > 1]

    def add_gradient(self, ids: Tensor, share: float) -> None:
        """Add `share` of the gradient of L_LM on `ids` (B, T) to the `grad` of whatever is `learning`."""
        with torch.enable_grad():
            (share * self.lm_loss(ids)).backward()

    def lm_loss(self, ids: Tensor) -> Tensor:
        """L_LM: mean nats per predicted token of `ids` (B, T)."""
        with self.withheld(self.model):
            return self._lm_loss(ids)

    def _lm_loss(self, ids: Tensor) -> Tensor:
        if self.projects:
            return head_loss.taught(self.model, ids, how=self._slopes)[1]
        return next_token_loss(self.model(input_ids=ids, use_cache=False).logits, ids).mean()

    def withheld(self, *models: nn.Module) -> AbstractContextManager[Any]:
        """Heads hand on what they are given inside, (B, T, D), if their projection is all there is."""
        held = contextlib.ExitStack()
        for model in models if self.projects else ():
            held.enter_context(head_loss.withheld(model))
        return held

    def gate_loss(self, weights: Tensor, ids: Tensor) -> Tensor:
        """L_LM on `ids` (B, T), whose gradient reaches the `weights` of what is gated, and nothing else: `lm_loss` in
        parts side by side, a few rows of the batch each; on a GPU in one part, recorded and replayed."""
        wide = parallel.lanes(self.device, len(ids))

        def part(rows: Tensor) -> Tensor:
            """The part's share of the loss and of its gradient, in one row."""
            with torch.enable_grad():
                loss = self._lm_loss(rows)
                (gradient,) = torch.autograd.grad(loss, weights)
            return torch.cat([loss.detach().view(1), gradient.flatten()]) * (len(rows) / len(ids))

        def lane(rows: Tensor) -> Tensor:
            few = budget.at_once(self.config) if self.config.recompute else len(rows)
            return torch.stack([part(some) for some in rows.split(few)]).sum(0)

        with self.withheld(self.model):
            if wide > 1:
                parts = parallel.run([functools.partial(lane, rows) for rows in ids.chunk(wide)], self.device)
                told = torch.stack(parts).sum(0)
            else:
                told = self._replay([*self._open, weights], part)(ids)
        moved = weights - weights.detach()  # nought, with a gradient
        return told[0] + (moved * told[1:].view_as(weights)).sum()

    def _replay(self, known: list[object], part: Callable[[Tensor], Tensor]) -> cuda_graphs.Recorded:
        """`part`, recorded once for all calls that find the same objects `known`."""
        if self._recorded is None or [id(x) for x in self._recorded[0]] != [id(x) for x in known]:
            self._recorded = known, cuda_graphs.Recorded(part, self.model)
        return self._recorded[1]

    @contextlib.contextmanager
    def _opened(self, context: AbstractContextManager[Opened]) -> Iterator[Opened]:
        """`context`, which changes what a pass does: what is recorded inside ends with it."""
        mark = object()
        with context as found:
            self._open.append(mark)
            try:
                yield found
            finally:
                self._open.remove(mark)
                if self._recorded and mark in self._recorded[0][:-1]:
                    self._recorded = None

    def lanes(self, rows: int) -> list[Lab]:
        """This lab as several, whose passes may go side by side for a batch of `rows` blocks: on the same values, but
        what learns gathers gradients of its own in each, which `gather` adds up. `[self]` where one pass at a time is
        best."""
        wide = parallel.lanes(self.device, rows)
        return [self._lane() for _ in range(wide)] if wide > 1 else [self]

    def _lane(self) -> Lab:
        twin = copy.copy(self)
        twin.stack = replicas.lane(self.stack)
        twin.teacher = replicas.lane(self.teacher) if self.teacher else None
        return twin

    def gather(self, lanes: list[Lab]) -> None:
        replicas.gather(self.stack, [each.stack for each in lanes])

    def taught_loss(
        self, ids: Tensor, share: float, joins: Callable[[], dict[int, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """L_LM on `ids` (B, T), without a gradient, and (1 - share) L_LM + share distance(teacher, model).

        Args:
            share: 0 to 1; above 0 there has to be a teacher.
            joins: tells, after this model's forward pass, its hidden states (B, T, D) at some places: by layer of the
                dense model what enters it, under L what leaves the last. The distance is then their mean relative
                distance from the teacher's; without it, KL(teacher, model) in nats a predicted token.
        """
        if not share or self.teacher is None:
            lm = self.lm_loss(ids)
            return lm.detach(), lm
        if self.projects and not joins:
            with self.withheld(self.model, self.teacher.model):
                lm, loss = head_loss.taught(self.model, ids, self.teacher.model, share, self._slopes)
            return lm, loss
        logits = self.model(input_ids=ids, use_cache=False).logits
        lm = next_token_loss(logits, ids).mean()
        if joins:
            found = joins()
            with torch.no_grad():
                wanted = states_at(self.teacher, ids, found)
            distance = torch.stack([relative_distance(wanted[i], found[i]) for i in found]).mean()
        else:
            with torch.no_grad():
                logits_there = self.teacher.model(input_ids=ids, use_cache=False).logits
                p = logits_there[:, :-1].flatten(0, 1).float().log_softmax(-1)
            q = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
            distance = F.kl_div(q, p, reduction="batchmean", log_target=True)
        return lm.detach(), (1 - share) * lm + share * distance

    def gated(self, weights: Tensor, kind: str, layers: Collection[int]) -> AbstractContextManager[None]:
        return self._opened(hooks.gated(self.stack, weights, kind, layers))

    def skipped(self, layers: Collection[int]) -> AbstractContextManager[None]:
        return self._opened(hooks.skipped(self.stack, layers))

    def tapped(self, layers: Sequence[int]) -> AbstractContextManager[dict[int, tuple[Tensor, Tensor]]]:
        return self._opened(hooks.tapped(self.stack, layers))

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """For steps inside, as the config wants it: layers and the loss are compiled where there is a GPU, and layers
        computed again on the way back."""
        with contextlib.ExitStack() as held:
            if self.config.fuse and self.device.type == "cuda":
                held.callback(setattr, self, "_slopes", head_loss.slopes)
                self._slopes = compilation.compiled(head_loss.slopes)
                held.enter_context(self._opened(compilation.fused(self.stack)))
            if self.config.recompute:
                held.enter_context(self._opened(compilation.recomputed(self.stack)))
            yield

    def rewritten(self, edits: Mapping[nn.Parameter, Tensor]) -> AbstractContextManager[None]:
        return training.rewritten(edits)

    def narrowed(self, layers: Sequence[nn.Module], entries: Mapping[str, int]) -> AbstractContextManager[nn.Module]:
        return removal.narrowed(self.stack, layers, entries)

    def heard(self, module: nn.Module) -> AbstractContextManager[list[Tensor]]:
        return hooks.heard(module)

    @contextlib.contextmanager
    def learning(self, parameters: Collection[nn.Parameter]) -> Iterator[None]:
        """Only `parameters` of the model learn inside."""
        with training.learning(self.model, parameters):
            yield

    def loss_without(self, layers: Collection[int], ids: Tensor) -> float:
        """L_LM on `ids` (B, T) with `layers` skipped."""
        with torch.inference_mode(), self.skipped(layers), self.withheld(self.model):
            return self.loss_given(self.model(input_ids=ids, use_cache=False).logits, ids)

    def loss_given(self, states: Tensor, ids: Tensor) -> float:
        """L_LM on `ids` (B, T), from what a head that is `withheld` is given (B, T, D), or where none can be from the
        logits (B, T, V); without gradients."""
        nats = head_loss.nats_given(self.model, states, ids) if self.projects else next_token_loss(states, ids)
        return nats.double().mean().item()

    def search(self, batches: Sequence[Tensor], rounds: int = 1) -> Search:
        """The losses of `batches` (B, T) without each layer, for a greedy search of so many rounds."""
        return Search(self, batches, rounds)

    def fit(
        self,
        optimizer: torch.optim.Optimizer | EagerAdamW,
        loss: Callable[[Tensor], Tensor],
        steps: int,
        seed: int,
        stage: str,
        before: Callable[[int], None] | None = None,
        after: Callable[[], None] | None = None,
        first: int = 1,
        skip: int = 0,
    ) -> Iterator[int]:
        """Take `steps` optimiser steps and yield the number of each after it; nothing is held open at a yield.

        Args:
            optimizer: a torch one, or an `EagerAdamW` that is stepping.
            loss: of a batch (B, T): the scalar to step down. It may call backward on parts of its own before, or on
                all of it: then it has no graph.
            stage: named in the error.
            before: called with the step's number before it, to set rates.
            after: called after each step, to project parameters.
            first: number of the first step.
            skip: batches of the seed's order that are left out before the first.

        Raises:
            TrspError: the loss is not a finite number; names the step.
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
