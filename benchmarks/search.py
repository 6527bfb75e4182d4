"""Whole searches against what a reader of the papers would write: SLEB, seven of thirty layers, and stage 1's rounds.
The choices have to be the same. Default model, 512 tokens; each round is timed both ways, one after the other.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import Row, row
from trsp_core.data import blocks
from trsp_core.models import loading
from trsp_core.pruning import validate
from trsp_core.pruning.lab import Lab
from trsp_core.surgery import discovery, hooks
from trsp_core.surgery.stack import Stack

MODEL, ROUNDS, STEPS = "smollm2-135m", 7, 3
TEXT = {
    "block_length": 128,
    "batch_blocks": 4,
    "score_blocks": 4,
    "calibration_blocks": 64,
    "measure_blocks": 4,
    "probe_blocks": 4,
}


def run() -> Iterator[Row]:
    """A row each: the ratio is that of all rounds together, the spread that of single ones."""
    model, tokenizer = loading.load(MODEL, device="cpu")
    model.requires_grad_(False)
    config = validate.from_values({**TEXT, "stage1_steps": STEPS})
    lab = Lab(discovery.find(model), blocks.prepare(config, tokenizer).calibration, config)
    yield sleb(lab)
    yield from stage_one(lab)


def sleb(lab: Lab) -> Row:
    """Each round of the greedy search, naive and ours."""
    (ids,) = lab.sample(lab.config)
    chosen: list[int] = []
    times: list[tuple[float, float]] = []
    search = lab.search([ids], rounds=ROUNDS)
    for _ in range(ROUNDS):
        free = lab.candidates(lab.config, chosen)
        naive, slow = timed(lambda free=free: {i: textbook_loss(lab.stack, [*chosen, i], ids) for i in free})
        ours, fast = timed(lambda free=free: dict(search.losses(free, chosen, bounds=bool(chosen))))
        best = [min(free, key=lambda i, of=of: of[i]) for of in (naive, ours)]
        if best[0] != best[1]:
            raise RuntimeError(f"the searches differ after {chosen}: {best}")
        chosen.append(best[0])
        times.append((slow, fast))
    facts = {"layers": chosen, "tokens": ids.numel(), "threads": torch.get_num_threads()}
    return whole("SLEB: naive search over ours", times, 2.5, **facts)


def textbook_loss(stack: Stack, removed: list[int], ids: torch.Tensor) -> float:
    """One pass from the input up, with transformers' own loss."""
    with torch.inference_mode(), hooks.skipped(stack, removed):
        return stack.model(input_ids=ids, labels=ids, use_cache=False).loss.item()


def stage_one(lab: Lab) -> Iterator[Row]:
    """The same rounds: ours; with chosen layers run and multiplied by nought, all logits at once; the same with W's
    gradients worked out and thrown away, as a loop does that freezes nothing."""
    rounds: dict[str, list[float]] = {"ours": [], "plain": [], "unfrozen": []}
    weights = {name: torch.ones(lab.n_layers, requires_grad=True) for name in rounds}
    optimizers = {name: torch.optim.Adam([s], lr=lab.config.stage1_lr, fused=False) for name, s in weights.items()}
    chosen: dict[str, list[int]] = {name: [] for name in rounds}
    for round_ in range(1, ROUNDS + 1):
        for name, s in weights.items():
            P, free = chosen[name], [i for i in range(lab.n_layers) if i not in chosen[name]]
            began = time.perf_counter()
            if name == "ours":
                with lab.learning([]), lab.gated(s, "branch", free), lab.skipped(P):
                    _steps(lab, optimizers[name], s, free, P, round_, lambda ids, s=s: lab.gate_loss(s, ids))
            else:
                learn = list(lab.model.parameters()) if name == "unfrozen" else []
                with lab.learning(learn), lab.gated(s, "branch", range(lab.n_layers)):
                    _steps(lab, optimizers[name], s, free, P, round_, lambda ids: _textbook(lab, ids))
                lab.model.zero_grad(set_to_none=True)
            rounds[name].append(time.perf_counter() - began)
            P.append(min(free, key=lambda i, s=s: abs(s[i].item())))
    if chosen["ours"] != chosen["plain"]:
        raise RuntimeError(f"the choices differ: {chosen}")
    for name in ("plain", "unfrozen"):
        times = list(zip(rounds[name], rounds["ours"], strict=True))
        facts = {"layers": chosen["ours"], "steps_a_round": STEPS}
        aim = 1.5 if name == "plain" else None
        yield whole(f"stage 1, whole: {name} rounds over ours", times, aim, **facts)


def _steps(
    lab: Lab, optimizer: Any, s: torch.Tensor, free: list[int], P: list[int], round_: int, lm: Callable[..., Any]
) -> None:
    for ids in lab.batches(STEPS, round_):
        with torch.no_grad():
            s[P] = 0.0
        with torch.enable_grad():
            (lm(ids) + lab.config.lambda_1 * s[free].abs().sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _textbook(lab: Lab, ids: torch.Tensor) -> torch.Tensor:
    return lab.model(input_ids=ids, labels=ids, use_cache=False).loss


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns, and its seconds."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def whole(name: str, times: list[tuple[float, float]], aim: float | None, **facts: Any) -> Row:
    """A row of a search, from the seconds of each round, theirs and ours."""
    theirs, ours = (sum(part) for part in zip(*times, strict=True))
    facts |= {"seconds_theirs": round(theirs, 2), "seconds_ours": round(ours, 2)}
    told = row(name, [a / b for a, b in times], aim, "higher", **facts)
    return dataclasses.replace(told, ratio=round(theirs / ours, 3))
