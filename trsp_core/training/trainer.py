"""Takes the steps of stage 2. `PlainTrainer` takes them as the equation is written; `Trainer` takes the same steps in
less time and memory, and a test holds the two equal."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trsp_core.perf import budget, cuda_graphs, parallel
from trsp_core.perf.optimizer_in_backward import EagerAdamW
from trsp_core.schema.config import RunConfig
from trsp_core.surgery import lora, quantization
from trsp_core.training.passes import Passes, Taps


@dataclass(frozen=True)
class Terms:
    """What stage 2 minimises, term by term, from one pass; all are scalars.

    Attributes:
        lm: L_LM, without a gradient.
        loss: L_LM, or what takes its place where a teacher is distilled.
        penalties: R of each penalised layer, by its number.
        gaps: the relative gap of each penalised layer, without a gradient; for the record.
    """

    lm: Tensor
    loss: Tensor
    penalties: dict[int, Tensor]
    gaps: list[Tensor]

    @property
    def penalty(self) -> Tensor:
        """The sum of the penalties; 0 without any."""
        return torch.stack([*self.penalties.values()]).sum() if self.penalties else self.loss.new_zeros(())

    def record(self) -> Tensor:
        """L_LM, the sum of penalties and the K gaps, in one tensor (2 + K,) without a gradient."""
        return torch.stack([self.lm, self.penalty.detach(), *self.gaps])


Objective = Callable[[Passes, Taps, Tensor], Terms]


class PlainTrainer:
    """Minimises  loss + lambda_2 * sum of penalties  with AdamW: a step is one forward pass, one backward pass, one
    step of the optimiser. A context manager; on exit only the values of the weights have changed.

    Args:
        objective: makes a pass over token ids (B, T), which fills the taps, and returns its terms.
        tapped: layers whose X_in and X_out the objective reads from the taps.
        chosen: the layers that are penalised and, where `config.anneal` is above 0, faded out.

    Attributes:
        optimizer: AdamW; `base` of a parameter group is its learning rate before the schedule.
        lambda_2: the factor of the penalties in the next step.
        record: L_LM, the sum of penalties and the K gaps of the last pass.
    """

    def __init__(self, passes: Passes, config: RunConfig, objective: Objective, tapped: list[int], chosen: list[int]):
        self.passes, self.config, self.objective, self.chosen = passes, config, objective, chosen
        self.lambda_2, self.record = 0.0, []
        self._tapped, self._gate = tapped, torch.ones(passes.n_layers, device=passes.device)
        self._temporary = False  # whether the adapters are this trainer's own, and merged at its end

    def __enter__(self) -> PlainTrainer:
        with contextlib.ExitStack() as self._contexts:
            self._begin()
            self._contexts = self._contexts.pop_all()  # nothing failed: open until the trainer is left
        return self

    def _begin(self) -> None:
        stack, config = self.passes.stack, self.config
        weights = list(self.passes.model.parameters())
        if config.adapter_rank:
            weights = lora.learnable(stack)  # those on packed weights are there already, and outlive stage 2
            self._temporary = not weights
            weights = weights or self._contexts.enter_context(lora.adapted(stack, config.adapter_rank, config.seed))
        outputs = {id(p) for i in self.chosen for p in stack.outputs(i)}
        base = config.adapter_lr if config.adapter_rank else config.stage2_lr
        groups = [
            {"params": [p for p in weights if id(p) not in outputs], "base": base},
            {"params": [p for p in weights if id(p) in outputs], "base": base * config.output_rate},
        ]
        self.optimizer = self._optimizer([group for group in groups if group["params"]], base)
        self._contexts.enter_context(self.passes.learning(weights))
        self._open(weights)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._contexts:
            if self._temporary and kind is None:
                lora.merge(self.passes.stack)

    def pace(self, lambda_2: float, rate: float) -> None:
        """Set the factors of the next step: `lambda_2` of the penalties, and `rate` of the learning rates."""
        self.lambda_2 = lambda_2
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate

    def fade(self, layers: list[int], opening: float) -> None:
        """Set the gates of `layers` for the next step to `opening`, 1 for open and 0 for shut; other chosen layers get
        0."""
        self._gate[self.chosen] = 0.0
        self._gate[layers] = opening

    def loss(self, ids: Tensor) -> Tensor:
        """What a step minimises on a batch (B, T), a scalar; whoever calls `backward` on it computes the gradients.
        Under `penalty_reach` "local" the gradients of the penalties are there already, and not in its graph."""
        self._taps.clear()
        terms = self.objective(self.passes, self._taps, ids)
        self.record = terms.record().tolist()
        if self.config.penalty_reach == "model":
            return terms.loss + self.lambda_2 * terms.penalty
        for layer, penalty in terms.penalties.items():
            torch.autograd.backward(self.lambda_2 * penalty, inputs=own_weights(self.passes, layer), retain_graph=True)
        return terms.loss + 0.0 * terms.penalty.detach()  # so that a penalty that is not a number shows in the loss

    def _optimizer(self, groups: list[dict[str, Any]], rate: float) -> Any:
        return torch.optim.AdamW(groups, rate, weight_decay=0.0)

    def _open(self, weights: list[nn.Parameter]) -> None:
        if self.config.anneal:
            self._contexts.enter_context(self.passes.gated(self._gate, "branch", self.chosen))
        self._taps = self._contexts.enter_context(self.passes.tapped(self._tapped))


def own_weights(passes: Passes, layer: int) -> list[nn.Parameter]:
    """The parameters of layer `layer` that learn."""
    return [p for p in passes.stack.layers[layer].parameters() if p.requires_grad]


class Trainer(PlainTrainer):
    """Takes the steps of `PlainTrainer` in less time and memory.

    - Each parameter is stepped as soon as its gradient is whole (`optimizer_in_backward`): a quarter less memory.
    - With adapters, whose gradients are small, a batch is split over the cores, and passes a few blocks at a time.
    - Once the gates of the chosen layers are shut, these layers are skipped. Their weights, which nothing reads any
      more, stay as they are from then on.
    - On a GPU the pass is recorded once and replayed (`cuda_graphs`).
    """

    optimizer: EagerAdamW

    def pace(self, lambda_2: float, rate: float) -> None:
        super().pace(lambda_2, rate)
        self._lambda_2.fill_(lambda_2)
        self.optimizer.pace()

    def fade(self, layers: list[int], opening: float) -> None:
        super().fade(layers, opening)
        if self.chosen and not self._shut and not (opening and layers):
            self._shut = True
            for lane in self._lanes:
                self._contexts.enter_context(lane.skipped(self.chosen))
            self._pass = self._recorded()

    def loss(self, ids: Tensor) -> Tensor:
        """The value of what a step minimises on a batch (B, T), without a graph: the backward pass has run already."""
        value, *self.record = self._pass(ids).tolist()
        for taps in self._taps_of.values():
            taps.clear()
        return torch.tensor(value)

    def _optimizer(self, groups: list[dict[str, Any]], rate: float) -> EagerAdamW:
        return EagerAdamW(groups, rate, together=bool(self.config.adapter_rank))

    def _open(self, weights: list[nn.Parameter]) -> None:
        config, passes = self.config, self.passes
        self._learning_weights, self._lambda_2, self._shut = weights, torch.zeros((), device=passes.device), False
        # Each lane has gradients of its own: with all weights that would be too much memory. And a penalty that is
        # summed over tokens is not the mean of such sums over parts of a batch.
        splits = bool(config.adapter_rank) and config.penalty != "sum"
        self._lanes: Sequence[Passes] = passes.lanes(config.batch_blocks) if splits else [passes]
        narrow = len(self._lanes) > 1 and not quantization.is_packed(passes.model)
        self._blocks_at_once = budget.at_once(config) if narrow else config.batch_blocks
        for lane in self._lanes if config.anneal else ():
            self._contexts.enter_context(lane.gated(self._gate, "branch", self.chosen))
        self._taps_of = {lane: self._contexts.enter_context(lane.tapped(self._tapped)) for lane in self._lanes}
        for lane in self._lanes:
            self._contexts.enter_context(lane.stepping())
        self._contexts.enter_context(self.optimizer.stepping())
        self._pass = self._recorded()
        self._contexts.callback(lambda: delattr(self, "_pass"))  # frees the memory of the recording

    def _recorded(self) -> cuda_graphs.Recorded:
        return cuda_graphs.Recorded(self._all_blocks, self.passes.model, self._learning_weights)

    def _all_blocks(self, ids: Tensor) -> Tensor:
        """Loss and record of a batch (B, T), in one tensor (3 + K,), after its backward pass."""
        chunks = zip(self._lanes, ids.chunk(len(self._lanes)), strict=False)
        tasks = [functools.partial(self._lane_blocks, lane, blocks, len(ids)) for lane, blocks in chunks]
        parts = parallel.run(tasks, self.passes.device)
        self.passes.gather(self._lanes)
        return torch.stack(parts).sum(0)

    def _lane_blocks(self, lane: Passes, blocks: Tensor, whole: int) -> Tensor:
        parts = [self._few_blocks(lane, few, len(few) / whole) for few in blocks.split(self._blocks_at_once)]
        return torch.stack(parts).sum(0)

    def _few_blocks(self, lane: Passes, ids: Tensor, share: float) -> Tensor:
        """A forward and backward pass over `ids`, which are `share` of the batch; returns that share of loss and
        record, (3 + K,)."""
        with torch.enable_grad():
            taps = self._taps_of[lane]
            taps.clear()
            terms = self.objective(lane, taps, ids)
            loss = self._with_penalties(lane, terms, share)
            if loss.is_cuda or torch.isfinite(loss):  # else nothing may be stepped; asking a GPU means to wait for it
                (share * loss).backward()
            return share * torch.cat([loss.detach().view(1), terms.record()]).double()

    def _with_penalties(self, lane: Passes, terms: Terms, share: float) -> Tensor:
        if not self.config.lambda_2 or not self.chosen or self._shut:
            return terms.loss
        weight = self._lambda_2.to(terms.loss.device)
        if self.config.penalty_reach == "model":
            return terms.loss + weight * terms.penalty
        for layer, penalty in terms.penalties.items():
            with self.optimizer.held():
                own = own_weights(lane, layer)
                torch.autograd.backward(share * weight * penalty, inputs=own, retain_graph=True)
        return terms.loss + 0.0 * terms.penalty.detach()
