"""A model's passes, forward and backward: its losses, and contexts that change what it computes. The plain form of each
loss is `losses.next_token_loss` of the logits; the forms here give the same numbers in less memory and time."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trsp_core.evaluation.losses import next_token_loss, relative_distance, states_at
from trsp_core.perf import budget, compilation, cuda_graphs, head_loss, parallel, replicas
from trsp_core.schema.config import RunConfig
from trsp_core.surgery import hooks, training
from trsp_core.surgery.stack import Stack

Opened = TypeVar("Opened")
Taps = dict[int, tuple[Tensor, Tensor]]  # X_in and X_out (B, T, D) of a layer


class Passes:
    """A model whose passes can be changed while a context is open.

    Args:
        ids: a few token ids (B, T), for a first pass that looks at the head.

    Attributes:
        stack: the model and its L layers.
        device: where the model's input goes.
        teacher: a copy of the dense model, for `taught_loss`; None where nothing is distilled.
        projects: whether logits are a linear map of the last hidden states and nothing else, so that a loss need not
            hold all of them.
    """

    def __init__(self, stack: Stack, config: RunConfig, ids: Tensor):
        self.stack, self.config = stack, config
        self.device = next(stack.model.parameters()).device
        self.teacher: Stack | None = None
        self.projects = head_loss.projects(stack.model, ids.to(self.device))
        self._slopes: head_loss.Slopes = head_loss.slopes
        self._open: list[object] = []  # a mark for each context that changes what a pass does
        self._recorded: tuple[list[object], cuda_graphs.Recorded] | None = None

    @property
    def n_layers(self) -> int:
        return len(self.stack.layers)

    @property
    def model(self) -> nn.Module:
        return self.stack.model

    def lm_loss(self, ids: Tensor) -> Tensor:
        """L_LM: the mean loss on `ids` (B, T), a scalar in nats a predicted token, with gradients."""
        with self.withheld(self.model):
            return self._lm_loss(ids)

    def _lm_loss(self, ids: Tensor) -> Tensor:
        if self.projects:
            return head_loss.taught(self.model, ids, how=self._slopes)[1]
        return next_token_loss(self.model(input_ids=ids, use_cache=False).logits, ids).mean()

    def withheld(self, *models: nn.Module) -> AbstractContextManager[Any]:
        """Inside, the heads of `models` return the hidden states (B, T, D) that they are given, instead of logits.
        Where logits are more than a projection of these (not `projects`) nothing changes."""
        contexts = contextlib.ExitStack()
        for model in models if self.projects else ():
            contexts.enter_context(head_loss.withheld(model))
        return contexts

    def loss_given(self, states: Tensor, ids: Tensor) -> float:
        """L_LM on `ids` (B, T), in nats a predicted token, without gradients.

        Args:
            states: what the model returns for `ids` inside `withheld`: hidden states (B, T, D), or where not `projects`
                logits (B, T, V).
        """
        nats = head_loss.nats_given(self.model, states, ids) if self.projects else next_token_loss(states, ids)
        return nats.double().mean().item()

    def gate_loss(self, weights: Tensor, ids: Tensor) -> Tensor:
        """L_LM on `ids` (B, T), a scalar, inside `gated`, with a gradient for its layer `weights` (L,) alone. It is
        `lm_loss`, computed faster: the batch is split over the cores of a CPU, or the pass recorded on a GPU."""
        wide = parallel.lanes(self.device, len(ids))

        def part(blocks: Tensor) -> Tensor:
            """What these blocks add to the loss and to its gradient, in one tensor (1 + L,)."""
            with torch.enable_grad():
                loss = self._lm_loss(blocks)
                (gradient,) = torch.autograd.grad(loss, weights)
            return torch.cat([loss.detach().view(1), gradient.flatten()]) * (len(blocks) / len(ids))

        def lane(blocks: Tensor) -> Tensor:
            count = budget.at_once(self.config) if self.config.recompute else len(blocks)
            return torch.stack([part(few) for few in blocks.split(count)]).sum(0)

        with self.withheld(self.model):
            if wide > 1:
                parts = parallel.run([functools.partial(lane, blocks) for blocks in ids.chunk(wide)], self.device)
                whole = torch.stack(parts).sum(0)
            else:
                whole = self._replay([*self._open, weights], part)(ids)
        difference = weights - weights.detach()  # zero, with a gradient
        return whole[0] + (difference * whole[1:].view_as(weights)).sum()

    def _replay(self, known: list[object], part: Callable[[Tensor], Tensor]) -> cuda_graphs.Recorded:
        """`part` as a recording, which is made once and holds as long as the objects in `known` are the same."""
        if self._recorded is None or [id(x) for x in self._recorded[0]] != [id(x) for x in known]:
            self._recorded = known, cuda_graphs.Recorded(part, self.model)
        return self._recorded[1]

    def taught_loss(
        self, ids: Tensor, share: float, joins: Callable[[], dict[int, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Two scalars of a pass over `ids` (B, T): L_LM without a gradient, and with one the loss to minimise,
        (1 - share) L_LM + share distance(teacher, model).

        Args:
            share: 0 to 1; 0, or no teacher, leaves L_LM alone.
            joins: None for the distance KL(teacher, model), in nats a predicted token. Otherwise it is called after
                this model's pass, and returns some of its hidden states (B, T, D), each by the layer of the dense model
                that it enters, or by L for what leaves the last; the distance is their mean relative distance from the
                teacher's.
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
            states = joins()
            with torch.no_grad():
                targets = states_at(self.teacher, ids, states)
            distance = torch.stack([relative_distance(targets[i], states[i]) for i in states]).mean()
        else:
            with torch.no_grad():
                teacher_logits = self.teacher.model(input_ids=ids, use_cache=False).logits
                p = teacher_logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
            q = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
            distance = F.kl_div(q, p, reduction="batchmean", log_target=True)
        return lm.detach(), (1 - share) * lm + share * distance

    def gated(self, weights: Tensor, kind: str, layers: Collection[int]) -> AbstractContextManager[None]:
        """Inside, each layer i of `layers` hands on its output weighted by s_i: see `hooks.gated`."""
        return self._opened(hooks.gated(self.stack, weights, kind, layers))

    def skipped(self, layers: Collection[int]) -> AbstractContextManager[None]:
        """Inside, `layers` compute nothing and hand on their input: see `hooks.skipped`."""
        return self._opened(hooks.skipped(self.stack, layers))

    def tapped(self, layers: Sequence[int]) -> AbstractContextManager[Taps]:
        """The taps of `layers`, which each pass inside fills anew: see `hooks.tapped`."""
        return self._opened(hooks.tapped(self.stack, layers))

    @contextlib.contextmanager
    def learning(self, parameters: Collection[nn.Parameter]) -> Iterator[None]:
        """Inside, only `parameters` of the model learn; on exit all gradients are gone."""
        with training.learning(self.model, parameters):
            yield

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Open this around training steps. As the config says, layers and the loss are compiled on a GPU (`fuse`), and
        layers are computed once more in the backward pass instead of being kept (`recompute`)."""
        with contextlib.ExitStack() as contexts:
            if self.config.fuse and self.device.type == "cuda":
                contexts.callback(setattr, self, "_slopes", head_loss.slopes)
                self._slopes = compilation.compiled(head_loss.slopes)
                contexts.enter_context(self._opened(compilation.fused(self.stack)))
            if self.config.recompute:
                contexts.enter_context(self._opened(compilation.recomputed(self.stack)))
            yield

    @contextlib.contextmanager
    def _opened(self, context: AbstractContextManager[Opened]) -> Iterator[Opened]:
        """Open `context`, which changes what a pass does, so that a recording made inside is not used after it."""
        mark = object()
        with context as value:
            self._open.append(mark)
            try:
                yield value
            finally:
                self._open.remove(mark)
                if self._recorded and mark in self._recorded[0][:-1]:
                    self._recorded = None

    def lanes(self, batch_blocks: int) -> list[Passes]:
        """This model as several over the same weights, so that parts of a batch of `batch_blocks` can pass side by
        side. Each has gradients of its own, which `gather` adds up. `[self]` where one pass at a time is best."""
        wide = parallel.lanes(self.device, batch_blocks)
        return [self._lane() for _ in range(wide)] if wide > 1 else [self]

    def _lane(self) -> Passes:
        twin = copy.copy(self)
        twin.stack = replicas.lane(self.stack)
        twin.teacher = replicas.lane(self.teacher) if self.teacher else None
        return twin

    def gather(self, lanes: Sequence[Passes]) -> None:
        """Add the gradients of `lanes` to this model's, and drop them there."""
        replicas.gather(self.stack, [lane.stack for lane in lanes])
