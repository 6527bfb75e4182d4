"""TRSP's stage 2: train the chosen layers to do nothing, so that the others take their knowledge over
(arXiv:2505.18232).

    minimise  L_LM(W; X) + lambda_2 * sum over i in P of R(X_out_i - X_in_i)

All layers run, s = 1. It follows any choice of layers, TRSP's or another method's.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
from torch import Tensor

from trsp_core.adam import EagerAdamW
from trsp_core.config import RunConfig
from trsp_core.events import Event, StageTwoStepped
from trsp_core.lab import Lab


def transfer(lab: Lab, config: RunConfig, chosen: list[int]) -> Generator[Event, None, None]:
    """One `StageTwoStepped` a step. The model's weights are changed when it ends, and when it is closed.

    Args:
        chosen: P; none where they are deleted already, and what is left learns from L_LM alone.
    """
    outputs = {id(p) for i in chosen for p in lab.stack.outputs(i)}
    W = list(lab.model.parameters())
    fast = [p for p in W if id(p) in outputs]
    rest = [p for p in W if id(p) not in outputs]
    groups = [{"params": rest, "times": 1.0}] + ([{"params": fast, "times": config.output_rate}] if fast else [])
    optimizer = EagerAdamW(groups, lr=config.stage2_lr)
    seen: dict = {}

    def before(step: int) -> None:
        seen["lambda_2"] = config.lambda_2 * ramp(step, config.stage2_steps, config.lambda_2_schedule)
        seen["rate"] = config.stage2_lr * rate_factor(step, config.stage2_steps, config.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = seen["rate"] * group["times"]

    with lab.learning(W), lab.tapped(chosen) as taps, optimizer.stepping():

        def loss(ids: Tensor) -> Tensor:
            seen["lm"], lm = lab.taught_loss(ids, config.distil)
            terms = [penalty(*taps[i], config.penalty) for i in chosen]
            total = torch.stack(terms).sum() if terms else lm.new_zeros(())
            seen["penalty"] = total.item()
            seen["gaps"] = [relative_gap(*taps[i]) for i in chosen]
            if seen["lambda_2"] == 0 or not chosen:
                return lm
            if config.penalty_reach == "model":
                return lm + seen["lambda_2"] * total
            for i, term in zip(chosen, terms, strict=True):
                own = [p for p in lab.stack.layers[i].parameters() if p.requires_grad]
                with optimizer.held():
                    torch.autograd.backward(seen["lambda_2"] * term, inputs=own, retain_graph=True)
            # The penalty has reached its layers; adding it here as a constant shows NaN without moving anything.
            return lm + 0.0 * total.detach()

        for step in lab.fit(optimizer, loss, config.stage2_steps, config.seed * 1009, "stage 2", before=before):
            taps.clear()
            yield StageTwoStepped(step, seen["lm"], seen["penalty"], seen["lambda_2"], seen["rate"], seen["gaps"])


def penalty(x_in: Tensor, x_out: Tensor, kind: str) -> Tensor:
    """R(X_out - X_in), a scalar, from X_in and X_out (B, T, D).

    l2, l1: the norm over D, averaged over tokens. relative: the l2 norm over the input's (detached), averaged over
    tokens. sum: the l2 norm, summed over tokens (the paper's plain sum).
    """
    gap = (x_out - x_in).float()
    if kind == "l1":
        return gap.abs().sum(-1).mean()
    norms = gap.norm(dim=-1)
    if kind == "relative":
        return (norms / x_in.detach().float().norm(dim=-1).clamp(min=1e-6)).mean()
    return norms.sum() if kind == "sum" else norms.mean()


def relative_gap(x_in: Tensor, x_out: Tensor) -> float:
    """Mean over tokens of |X_out - X_in| / |X_in|, the size of what a layer does, free of the model's scale."""
    with torch.no_grad():
        return penalty(x_in, x_out, "relative").item()


def ramp(step: int, steps: int, schedule: str) -> float:
    """Factor on lambda_2 at `step` of `steps` (from 1)."""
    return step / steps if schedule == "ramp" else 1.0


def rate_factor(step: int, steps: int, schedule: str) -> float:
    """Factor on the learning rate at `step` of `steps` (from 1): cosine has a warm-up of a tenth and ends at a
    tenth."""
    if schedule == "constant":
        return 1.0
    warm = max(1, steps // 10)
    if step <= warm:
        return step / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
