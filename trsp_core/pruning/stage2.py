"""TRSP's stage 2: train the chosen layers to do nothing, so that the others take their knowledge over
(arXiv:2505.18232).

    minimise  L_LM(W; X) + lambda_2 * sum over i in P of R(X_out_i - X_in_i)

All layers run, s = 1. It follows any choice of layers, TRSP's or another method's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator
from functools import partial

import torch
from torch import Tensor, nn

from trsp_core.perf import budget, cuda_graphs, parallel
from trsp_core.perf.optimizer_in_backward import EagerAdamW
from trsp_core.pruning.checkpointing import Waypoints
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.progress import Past
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import Event, Noted, StageTwoStepped
from trsp_core.schema.schedules import Span, lambda_2, opening, rate_factor
from trsp_core.surgery import lora, quantization


def transfer(
    lab: Lab,
    config: RunConfig,
    chosen: list[int],
    span: Span | None = None,
    deleted: bool = False,
    past: Past | None = None,
    waypoints: Waypoints | None = None,
) -> Generator[Event, None, None]:
    """One `StageTwoStepped` a step. The model's weights are changed when it ends, and when it is closed.

    Args:
        chosen: P.
        span: which of the steps; None for all of them.
        deleted: they are gone from the model already, and what is left learns from L_LM alone.
        past: go on after its step, from its file.
        waypoints: where points to resume from are kept.

    Raises:
        TrspError: the file of `past` does not fit.
    """
    span = span or Span(0, config.stage2_steps)
    waypoints = waypoints or Waypoints(None, config)
    done = past.step if past and past.checkpoint else span.done
    doomed = [] if deleted else chosen
    share, places = config.distil, _joins(chosen, lab.n_layers + (len(chosen) if deleted else 0))
    here = {place: place - (sum(i < place for i in chosen) if deleted else 0) for place in places}
    gate, weight = torch.ones(lab.n_layers, device=lab.device), torch.zeros((), device=lab.device)
    seen: dict = {}

    with contextlib.ExitStack() as held:
        held.callback(seen.clear)  # what is recorded, and its memory, ends here
        W = list(lab.model.parameters())
        kept = lora.learnable(lab.stack)  # those of packed weights, which outlive stage 2
        if config.adapter_rank:
            W = kept or held.enter_context(lora.adapted(lab.stack, config.adapter_rank, config.seed))
        optimizer = _optimizer(lab, config, W, doomed)
        held.enter_context(lab.learning(W))
        # Gradients of all of W are too much to add up; and what is no mean over tokens has no parts.
        labs = lab.lanes(config.batch_blocks) if config.adapter_rank and config.penalty != "sum" else [lab]
        few = budget.at_once(config)  # for a lane's way back holds less so
        at_once = few if len(labs) > 1 and not quantization.is_packed(lab.model) else config.batch_blocks
        if config.anneal:
            for each in labs:
                held.enter_context(each.gated(gate, "branch", doomed))
        tapped = _tapped(doomed, here.values(), lab.n_layers, bool(share))
        taps = {each: held.enter_context(each.tapped(tapped)) for each in labs}
        for each in labs:
            held.enter_context(each.stepping())
        held.enter_context(optimizer.stepping())
        if past and past.checkpoint:
            waypoints.restore(past.checkpoint, lab.stack, optimizer)

        def before(step: int) -> None:
            seen["lambda_2"] = lambda_2(config, step, span) if doomed else 0.0
            seen["factor"] = rate_factor(step, config.stage2_steps, config.lr_schedule)
            weight.fill_(seen["lambda_2"])
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * seen["factor"]
            optimizer.pace()
            fresh = [i for i in doomed if i not in lab.gone]
            gate[doomed] = 0.0
            gate[fresh] = opening(step - span.done, config.anneal * span.steps)
            if config.anneal and doomed and not gate[doomed].any() and "shut" not in seen:
                seen["shut"] = [held.enter_context(each.skipped(doomed)) for each in labs]
                seen.pop("pass", None)
            if "pass" not in seen:
                seen["pass"] = cuda_graphs.Recorded(partial(taken, lab, labs, objective, at_once), lab.model, W)

        def objective(lab: Lab, ids: Tensor, part: float) -> tuple[Tensor, Tensor]:
            """What is stepped down, of `part` of a batch; for the record L_LM, the penalty and the K relative gaps:
            (2 + K,)."""
            at = taps[lab]
            at.clear()

            def states() -> dict[int, Tensor]:
                return {p: at[lab.n_layers - 1][1] if i == lab.n_layers else at[i][0] for p, i in here.items()}

            lm, loss = lab.taught_loss(ids, share, states if config.distil_from == "states" else None)
            terms = [penalty(*at[i], config.penalty).to(loss.device) for i in doomed]
            total = torch.stack(terms).sum() if terms else loss.new_zeros(())
            with torch.no_grad():
                gaps = [penalty(*at[i], "relative").to(loss.device) for i in doomed]
                told = torch.stack([lm, total, *gaps])
            if config.lambda_2 == 0 or not doomed or "shut" in seen:
                return loss, told
            pull = weight.to(loss.device)
            if config.penalty_reach == "model":
                return loss + pull * total, told
            for i, term in zip(doomed, terms, strict=True):
                own = [p for p in lab.stack.layers[i].parameters() if p.requires_grad]
                with optimizer.held():
                    torch.autograd.backward(part * pull * term, inputs=own, retain_graph=True)
            # The penalty has reached its layers; adding it here as a constant shows NaN without moving anything.
            return loss + 0.0 * total.detach(), told

        def loss(ids: Tensor) -> Tensor:
            value, seen["lm"], seen["penalty"], *seen["gaps"] = seen["pass"](ids).tolist()
            return torch.tensor(value)

        how = {"before": before, "first": done + 1, "skip": done}
        for step in lab.fit(optimizer, loss, span.done + span.steps - done, config.seed * 1009, "stage 2", **how):
            for at in taps.values():
                at.clear()
            rate = (config.adapter_lr if config.adapter_rank else config.stage2_lr) * seen["factor"]
            yield StageTwoStepped(step, seen["lm"], seen["penalty"], seen["lambda_2"], rate, seen["gaps"])
            if waypoints.due() and (refusal := waypoints.keep(step, lab.stack, optimizer)):
                yield Noted(refusal)
        if config.adapter_rank and not kept:
            lora.merge(lab.stack)


def taken(
    lab: Lab, labs: list[Lab], objective: Callable[..., tuple[Tensor, Tensor]], at_once: int, ids: Tensor
) -> Tensor:
    """`objective` of a batch (B, T), and what it tells beside, in one row; all of it has gone back already. Where there
    are several `labs` each takes a few rows, side by side, `at_once` of them in a pass."""

    def part(each: Lab, rows: Tensor) -> Tensor:
        share = len(rows) / len(ids)
        with torch.enable_grad():
            loss, told = objective(each, rows, share)
            if loss.is_cuda or torch.isfinite(loss):  # else nothing is stepped on it; to ask a GPU is to wait for it
                (share * loss).backward()
        return share * torch.cat([loss.detach().view(1), told]).double()

    def lane(each: Lab, rows: Tensor) -> Tensor:
        return torch.stack([part(each, few) for few in rows.split(at_once)]).sum(0)

    tasks = [partial(lane, each, rows) for each, rows in zip(labs, ids.chunk(len(labs)), strict=False)]
    parts = parallel.run(tasks, lab.device)
    lab.gather(labs)
    return torch.stack(parts).sum(0)


def _optimizer(lab: Lab, config: RunConfig, W: list[nn.Parameter], doomed: list[int]) -> EagerAdamW:
    """AdamW over W; the groups have their `base` rates, the chosen layers' output projections one of their own."""
    outputs = {id(p) for i in doomed for p in lab.stack.outputs(i)}
    base = config.adapter_lr if config.adapter_rank else config.stage2_lr
    groups = [
        {"params": [p for p in W if id(p) not in outputs], "base": base},
        {"params": [p for p in W if id(p) in outputs], "base": base * config.output_rate},
    ]
    return EagerAdamW([g for g in groups if g["params"]], base, together=bool(config.adapter_rank))


def _joins(chosen: list[int], n_layers: int) -> list[int]:
    """The layers right behind each run of chosen ones, of L = `n_layers` in the dense model; L stands for its end."""
    return sorted({i + 1 for i in chosen} - {i for i in chosen if i < n_layers})


def _tapped(doomed: list[int], joins: Collection[int], n_layers: int, distils: bool) -> list[int]:
    return sorted({*doomed, *(min(i, n_layers - 1) for i in joins if distils)})


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
