"""The same steps on a GPU: Llama-shaped models of 1 and 8 billion parameters, built from a config with random weights,
in bfloat16, with fused layers and without, and in 4-bit. Share of the device's bfloat16 matrix rate, tokens per second,
memory.

    python -m benchmarks gpu --json
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import Row, row, steps
from trsp_core.errors import TrspError
from trsp_core.evaluation import perplexity
from trsp_core.pruning import validate
from trsp_core.surgery import discovery, quantization

SIZES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
SHAPE = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
BLOCKS, LENGTH = 4, 512


def run() -> Iterator[Row]:
    """Both sizes; stage 2 on all of W where it is not packed."""
    if not torch.cuda.is_available():
        raise TrspError("This benchmark needs a CUDA device, and torch sees none.", "Run it on a machine with a GPU.")
    for precision, fuse in (("bfloat16", False), ("nf4", False), ("bfloat16", True)):
        for size, shape in SIZES.items():
            yield from measured(size, SHAPE | shape, precision, "cuda", fuse)


def measured(size: str, shape: dict[str, Any], precision: str, device: str, fuse: bool = False) -> Iterator[Row]:
    """The steps of one model; the aim is half of the matrix rate."""
    with tempfile.TemporaryDirectory() as folder:
        model, seconds = built(shape, precision, device, Path(folder))
    stack = discovery.find(model)
    config = validate.from_values(
        {
            "block_length": LENGTH,
            "batch_blocks": BLOCKS,
            "stage1_steps": steps.STEPS,
            "stage2_steps": steps.STEPS,
            "fuse": fuse,
        }
    )
    blocks = torch.randint(0, shape["vocab_size"], (16, LENGTH))
    parameters, held = perplexity.parameter_bytes(model)
    how = f"{precision}, fused" if fuse else precision
    _peak(device)
    for name, each in steps.timed(stack, config, blocks, blocks, lambda: rate(device)):
        tokens = (len(blocks) if name == "perplexity" else BLOCKS) * LENGTH
        facts = {
            "parameters": parameters,
            "weights_gb": round(held / 1e9, 2),
            "peak_gb": round(_peak(device) / 1e9, 2),
            "tokens_per_second": round(tokens / statistics.median(s for _, s in each)),
            "seconds_to_load": round(seconds, 1),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "teraflops_of_products": round(rate(device) / 1e3),
        }
        if fuse and name == "perplexity":  # nothing is fused there
            continue
        yield row(f"{size} {how}, {name}: share of the matrix rate", [s for s, _ in each], 0.5, "higher", **facts)


def _peak(device: str) -> int:
    """The most bytes that were allocated on the device since the last call."""
    if device != "cuda":
        return perplexity.peak_bytes()
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def built(shape: dict[str, int], precision: str, device: str, folder: Path) -> tuple[Any, float]:
    """A random model, loaded as any model is; seconds that loading took."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        LlamaForCausalLM(LlamaConfig(**shape, dtype=torch.bfloat16)).to(torch.bfloat16).save_pretrained(folder)
    began = time.perf_counter()
    how = {"quantization_config": quantization.recipe("nf4", torch.bfloat16)} if precision == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}, **how)
    quantization.settle(model)
    return model.eval(), time.perf_counter() - began


def rate(device: str, seconds: float = 0.1) -> float:
    """GFLOP/s of bfloat16 matrix products on `device`, best of a short measurement."""
    n, at_once = (8192, 4) if device == "cuda" else (512, 1)
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        for _ in range(at_once):
            torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 * at_once / (time.perf_counter() - began) / 1e9)
    return best
