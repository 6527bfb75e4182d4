"""TRSP's stage 2: trains the model under a penalty on what the chosen layers P change, so that these learn to do
nothing and the others take over their knowledge (arXiv:2505.18232).

    minimise  L_LM(W; X) + lambda_2 * sum over i in P of R(X_out_i - X_in_i)

All layers run, unweighted (s = 1). P may be any method's choice.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trsp_core.pruning.lab import Lab
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import Event, Noted, StageTwoStepped
from trsp_core.schema.schedules import Span, lambda_2, opening, rate_factor
from trsp_core.training.checkpointing import Waypoints
from trsp_core.training.passes import Passes, Taps
from trsp_core.training.progress import Past
from trsp_core.training.trainer import PlainTrainer, Terms, Trainer


def transfer(
    lab: Lab,
    config: RunConfig,
    chosen: list[int],
    span: Span | None = None,
    deleted: bool = False,
    past: Past | None = None,
    waypoints: Waypoints | None = None,
    trainer_class: type[PlainTrainer] = Trainer,
) -> Generator[Event, None, None]:
    """Take steps of stage 2, and yield a `StageTwoStepped` for each. The weights stay changed, also when the generator
    is closed: whoever wants the old ones puts them back.

    Args:
        chosen: P.
        span: which of the steps to take; None for all of them.
        deleted: P is gone from the model already, so what remains trains without a penalty.
        past: of a run that broke off: its file is read, and its steps are not taken again.
        waypoints: writes files to resume from.
        trainer_class: how steps are taken; `PlainTrainer` takes the same ones in the plain way.

    Raises:
        TrspError: the file of `past` does not fit the model, or the loss is no longer a finite number.
    """
    span = span or Span(0, config.stage2_steps)
    waypoints = waypoints or Waypoints(None, config)
    equation = Equation(config, chosen, lab.n_layers, deleted)
    penalised_layers = equation.penalised_layers
    closing = [i for i in penalised_layers if i not in lab.gone]
    rate = "adapter_lr" if config.adapter_rank else "stage2_lr"

    with trainer_class(lab, config, equation, equation.tapped(), penalised_layers) as trainer:
        done = span.done
        if past and past.checkpoint:
            waypoints.restore(past.checkpoint, lab.stack, trainer.optimizer)
            done = past.step

        def factor(step: int) -> float:
            """On the learning rates of `config`: by the schedule, and by what was turned."""
            now = lab.steering.now(config)
            scheduled = rate_factor(step, now.stage2_steps, config.lr_schedule)
            return scheduled * (getattr(now, rate) / getattr(config, rate))

        def schedule(step: int) -> None:
            weight = lambda_2(lab.steering.now(config), step, span) if penalised_layers else 0.0
            trainer.pace(weight, factor(step))
            if config.anneal:
                trainer.fade(closing, opening(step - span.done, config.anneal * span.steps))

        remaining, seed = span.done + span.steps - done, config.seed * 1009
        more, optimizer = partial(lab.steering.steps, config, remaining), trainer.optimizer
        for step in lab.fit(optimizer, trainer.loss, more, seed, "stage 2", schedule, first=done + 1, skip=done):
            lm, penalty_sum, *gaps = trainer.record
            learning_rate = getattr(config, rate) * factor(step)
            yield StageTwoStepped(step, lm, penalty_sum, trainer.lambda_2, learning_rate, gaps)
            if waypoints.due() and (refusal := waypoints.keep(step, lab.stack, trainer.optimizer)):
                yield Noted(refusal)


@dataclass(frozen=True)
class Equation:
    """What stage 2 minimises for P = `chosen`, as the trainer's `Objective`. If `deleted`, `n_layers` is without P."""

    config: RunConfig
    chosen: list[int]
    n_layers: int
    deleted: bool

    @property
    def penalised_layers(self) -> list[int]:
        return [] if self.deleted else self.chosen

    def __call__(self, passes: Passes, taps: Taps, ids: Tensor) -> Terms:
        """Make a pass over `ids` (B, T), which fills `taps`, and return its terms."""

        def states() -> dict[int, Tensor]:
            return {
                dense: taps[self.n_layers - 1][1] if here == self.n_layers else taps[here][0]
                for dense, here in self.joins().items()
            }

        lm, loss = passes.taught_loss(ids, self.config.distil, states if self.config.distil_from == "states" else None)
        penalties = {i: penalty(*taps[i], self.config.penalty).to(loss.device) for i in self.penalised_layers}
        with torch.no_grad():
            gaps = [penalty(*taps[i], "relative").to(loss.device) for i in self.penalised_layers]
        return Terms(lm, loss, penalties, gaps)

    def joins(self) -> dict[int, int]:
        """The layer right above each run of chosen ones: its number in this model, by its number in the dense one. L
        stands for the end of a model with L layers. For P = {3, 4} of 6 layers it is {5: 5}, and {5: 3} once they are
        deleted."""
        dense = self.n_layers + (len(self.chosen) if self.deleted else 0)
        behind = sorted({i + 1 for i in self.chosen} - {i for i in self.chosen if i < dense})
        return {i: i - (sum(j < i for j in self.chosen) if self.deleted else 0) for i in behind}

    def tapped(self) -> list[int]:
        """The layers whose X_in and X_out the equation reads."""
        ends = {min(i, self.n_layers - 1) for i in self.joins().values()} if self.config.distil else set()
        return sorted({*self.penalised_layers, *ends})


def penalty(x_in: Tensor, x_out: Tensor, kind: str) -> Tensor:
    """R(X_out - X_in), a scalar, from X_in and X_out (B, T, D).

    l1, l2: that norm over D, averaged over tokens. relative: the l2 norm divided by that of X_in (detached), averaged
    over tokens. sum: the l2 norm, summed over tokens (the paper's plain sum).
    """
    gap = (x_out - x_in).float()
    if kind == "l1":
        return gap.abs().sum(-1).mean()
    norms = gap.norm(dim=-1)
    if kind == "relative":
        return (norms / x_in.detach().float().norm(dim=-1).clamp(min=1e-6)).mean()
    return norms.sum() if kind == "sum" else norms.mean()
