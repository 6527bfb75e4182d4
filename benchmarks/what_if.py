"""A toggle of a layer on 512 tokens: its time over its floor, and over a plain full recomputation.

The floor is the floating-point operations that the toggle needs, divided by the matrix rate measured in this process
just before and after it. Needed are the layers above the lowest change and the head; attention's products count,
embeddings, norms, the loss and the KL divergence do not.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks import Row, row
from trsp_core.evaluation import layer_removal, perplexity
from trsp_core.models import loading
from trsp_core.schema import messages as an
from trsp_core.schema.events import DOMAINS
from trsp_core.schema.messages import WhatIf
from trsp_core.surgery import discovery, hooks
from trsp_core.surgery.stack import Stack
from trsp_core.workbench import what_if
from trsp_core.workbench.model_cache import Model

MODEL = "smollm2-135m"
TOGGLES, AIM = 20, 1.35


def run() -> Iterator[Row]:
    """Toggles at random heights on random sets, each from a set that was just measured."""
    model, tokenizer = loading.load(MODEL, device="cpu")
    stack = discovery.find(model)
    study = what_if.study_of(WhatIf(MODEL, []), Model(MODEL, stack, tokenizer, 0, 0, 0.0))
    draw = random.Random(0)  # noqa: S311 - the same toggles each time
    list(study.measure([]))
    to_floor, to_full, seconds, heights = [], [], [], []
    for _ in range(TOGGLES):
        start = frozenset(draw.sample(range(len(stack.layers)), draw.randint(0, 8)))
        list(study.measure(sorted(start)))
        layer = draw.randrange(len(stack.layers))
        toggled = start ^ {layer}
        if study.known(toggled):
            continue
        needed = sum(operations(stack, path, toggled) for path in study.paths.values())
        rates = [perplexity.matrix_rate(0.2)]
        began = time.perf_counter()
        list(study.measure(sorted(toggled)))
        spent = time.perf_counter() - began
        rates.append(perplexity.matrix_rate(0.2))
        to_floor.append(spent / (needed / statistics.fmean(rates) / 1e9))
        to_full.append(full(stack, study, toggled) / spent)
        seconds.append(spent)
        heights.append(layer)
    facts = {
        "tokens": an.QUICK_TOKENS * len(DOMAINS),
        "toggles": len(seconds),
        "seconds_median": round(statistics.median(seconds), 3),
        "threads": torch.get_num_threads(),
    }
    yield row("what_if", to_floor, AIM, "lower", **facts)
    yield row("what_if_over_full", to_full, 1.0, "higher", **facts)


def operations(stack: Stack, path: layer_removal.Path, removed: frozenset[int]) -> float:
    """Floating-point operations of the layers and the head that must be computed for `removed`."""
    tokens, length = path.ids.numel(), path.ids.shape[1]
    running = [i for i in range(path.start(removed), len(stack.layers)) if i not in removed]
    config = stack.text_config
    matrices = sum(p.numel() for i in running for p in stack.layers[i].parameters() if p.dim() > 1)
    attention = 2 * length * config.hidden_size * len(running)  # scores and their product with the values
    head = config.vocab_size * config.hidden_size
    return 2.0 * tokens * (matrices + attention + head)


def full(stack: Stack, study: what_if.LayerStudy, removed: frozenset[int]) -> float:
    """Seconds of a plain forward pass over both texts without `removed`, with loss and no reuse."""
    began = time.perf_counter()
    with hooks.skipped(stack, removed):
        list(perplexity.block_losses(stack.model, torch.cat([path.ids for path in study.paths.values()])))
    return time.perf_counter() - began
