"""What a training step costs: the matrix products that it needs, at the rate measured beside it, over its time; and
against a textbook loop. Default model, 512 tokens a step.

Needed are, for each pass, two operations a matrix parameter and token and attention's products: one pass forward, one
back to the layer weights or adapters, a third for the gradients of W. The optimiser, norms and the loss do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import Row, row
from trsp_core.data import blocks as data
from trsp_core.evaluation import perplexity
from trsp_core.models import loading
from trsp_core.pruning import validate
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.methods import trsp
from trsp_core.pruning.stage2 import transfer
from trsp_core.schema import config as configs
from trsp_core.surgery import discovery
from trsp_core.surgery.stack import Stack

MODEL = "smollm2-135m"
STEPS, WARM, LENGTH = 8, 2, 128
TEXT = {"block_length": LENGTH, "batch_blocks": 4, "calibration_blocks": 64, "measure_blocks": 8}
PASSES = {"stage 1": 2, "stage 2": 3, "stage 2, LoRA": 2, "perplexity": 1}


def run() -> Iterator[Row]:
    """Stage 1, stage 2 on all of W and on adapters, perplexity; each step beside a measurement of the matrix rate."""
    model, tokenizer = loading.load(MODEL, device="cpu")
    config = validate.from_values(TEXT | {"stage1_steps": STEPS, "stage2_steps": STEPS})
    texts = data.prepare(config, tokenizer)
    blocks, measured = texts.calibration, texts.measure["calibration"]
    found = dict(timed(discovery.find(model), config, blocks, measured, perplexity.matrix_rate))
    plain = textbook(MODEL, texts.calibration)
    aims = {"stage 1": 0.8, "stage 2": 0.8, "perplexity": 0.85}
    facts = {"tokens": 4 * LENGTH, "threads": torch.get_num_threads()}
    for name, aim in aims.items():
        shares = [s for s, _ in found[name]]
        yield row(f"{name}: share of the matrix rate", shares, aim, "higher", **facts)
    for name, over, aim in (("stage 1", plain, 2.2), ("stage 2, LoRA", [t for _, t in found["stage 2"]], 1.4)):
        against = sorted(over)[len(over) // 2]
        ratios = [against / seconds for _, seconds in found[name]]
        what = "a textbook step with AdamW" if over is plain else "a step on all of W"
        yield row(f"{name}: tokens/s over {what}", ratios, aim, "higher", **facts)


def timed(
    stack: Stack, config: configs.RunConfig, blocks: torch.Tensor, measured: torch.Tensor, rate: Callable[[], float]
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Each kind of step, and of each step the share of the matrix rate and the seconds. The last kind, on all of W,
    changes the weights; packed ones have none to learn.

    Args:
        rate: GFLOP/s of matrix products in the number format at hand, measured when it is called.
    """
    stack.model.requires_grad_(False)
    chosen = list(range(len(stack.layers) // 2, len(stack.layers) // 2 + max(len(stack.layers) // 4, 1)))
    lab = Lab(stack, blocks, config)
    adapted = validate.from_values(config.as_dict() | {"adapter_rank": 8})
    kinds: dict[str, Any] = {
        "stage 1": lambda: trsp.choose(lab, config, 1),
        "stage 2, LoRA": lambda: transfer(lab, adapted, chosen),
        "perplexity": lambda: (list(perplexity.block_losses(stack.model, measured)) for _ in range(STEPS)),
        "stage 2": lambda: transfer(lab, config, chosen),
    }
    if getattr(stack.model, "is_quantized", False):
        del kinds["stage 2"]
    for name, make in kinds.items():
        ids = measured if name == "perplexity" else blocks[: config.batch_blocks]
        needed = operations(stack, ids.numel(), ids.shape[1]) * PASSES[name] / 1e9
        yield name, [(needed / (seconds * gflops), seconds) for seconds, gflops in _each(make(), rate)]


def _each(steps: Any, rate: Callable[[], float]) -> Iterator[tuple[float, float]]:
    """Seconds of each step but the first few, and the rate measured around it."""
    for number in range(STEPS):
        before = rate()
        began = time.perf_counter()
        if next(steps, None) is None:
            return
        _wait()
        seconds = time.perf_counter() - began
        if number >= WARM:
            yield seconds, (before + rate()) / 2
    steps.close()


def operations(stack: Stack, tokens: int, length: int) -> float:
    """Floating-point operations of one pass forward over `tokens` in blocks of `length`."""
    text = stack.text_config
    layers = sum(perplexity.parameter_bytes(layer)[0] for layer in stack.layers)
    attention = 2 * length * text.hidden_size * len(stack.layers)
    return 2.0 * tokens * (layers + attention + text.vocab_size * text.hidden_size)


def textbook(name: str, blocks: torch.Tensor) -> list[float]:
    """Seconds of plain steps on all of W with torch's AdamW, as a tutorial writes them."""
    model, _ = loading.load(name, device="cpu")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds = []
    for number in range(STEPS):
        ids = blocks[4 * number : 4 * number + 4]
        began = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if number >= WARM:
            seconds.append(time.perf_counter() - began)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
