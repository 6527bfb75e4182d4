"""The same steps on a GPU: Llama-shaped models of 1 and 8 billion parameters, built from a config with random weights,
in bfloat16 and in 4-bit. Share of the device's bfloat16 matrix rate, tokens per second, memory.

    python -m benchmarks gpu --json
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import Row, row, steps
from trsp_core import config as configs
from trsp_core import measure, quantized, surgery
from trsp_core.errors import TrspError

SIZES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY, BLOCKS, LENGTH = 128_256, 4, 512


def run() -> Iterator[Row]:
    """Both sizes; W learns in full for the small one alone."""
    if not torch.cuda.is_available():
        raise TrspError("This benchmark needs a CUDA device, and torch sees none.", "Run it on a machine with a GPU.")
    for size, shape in SIZES.items():
        for precision in ("bfloat16", "nf4"):
            yield from measured(size, {**shape, "num_key_value_heads": 8, "vocab_size": VOCABULARY}, precision, "cuda")


def measured(size: str, shape: dict[str, int], precision: str, device: str) -> Iterator[Row]:
    """The steps of one model; the aim is half of the matrix rate."""
    with tempfile.TemporaryDirectory() as folder:
        model, seconds = built(shape, precision, device, Path(folder))
    stack = surgery.find(model)
    more = {"adapter_rank": 8} if precision == "nf4" or size == "8B" else {}
    config = configs.from_values(
        {
            "block_length": LENGTH,
            "batch_blocks": BLOCKS,
            "stage1_steps": steps.STEPS,
            "stage2_steps": steps.STEPS,
            **more,
        }
    )
    blocks = torch.randint(0, shape["vocab_size"], (16, LENGTH))
    found = steps.timed(stack, config, blocks, blocks[:2].to(device), lambda: rate(device))
    parameters, held = measure.parameter_bytes(model)
    for name, each in found.items():
        tokens = (2 if name == "perplexity" else BLOCKS) * LENGTH
        facts = {
            "parameters": parameters,
            "weights_gb": round(held / 1e9, 2),
            "peak_gb": round(measure.peak_bytes() / 1e9, 2),
            "tokens_per_second": round(tokens / min(s for _, s in each)),
            "seconds_to_load": round(seconds, 1),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
        }
        yield row(f"{size} {precision}, {name}: share of the matrix rate", [s for s, _ in each], 0.5, "higher", **facts)


def built(shape: dict[str, int], precision: str, device: str, folder: Path) -> tuple[Any, float]:
    """A random model, loaded as any model is; seconds that loading took."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    began = time.perf_counter()
    how = {"quantization_config": quantized.recipe("nf4", torch.bfloat16)} if precision == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}, **how)
    quantized.settle(model)
    return model.eval(), time.perf_counter() - began


def rate(device: str, seconds: float = 0.2) -> float:
    """GFLOP/s of bfloat16 matrix products on `device`."""
    n = 4096 if device == "cuda" else 512
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.mm(a, b)
        done += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * n**3 * done / (time.perf_counter() - began) / 1e9
