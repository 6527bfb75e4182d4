"""Forecasts held against runs: how far off minutes and memory are, whichever way; the aim is a quarter.

The default model in full, with LoRA, in 4-bit and with layers computed again on the way back, and two other sizes built
from configs with random weights. Each run is a process of its own, as the app starts it, whose first event is the
forecast.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import Row, row
from trsp_core.models import catalog, libraries
from trsp_core.runs.store import Run
from trsp_core.schema import events as ev

MODEL = "smollm2-135m"
SHORT = ["--preset", "quick", "--stage1-steps", "3", "--stage2-steps", "12", "--measure-blocks", "6", "--seed", "0"]
KINDS = {
    "default model, full": (MODEL, []),
    "default model, LoRA": (MODEL, ["--adapter-rank", "8"]),
    "default model, 4-bit": (MODEL, ["--adapter-rank", "8", "--precision", "nf4"]),
    "default model, recomputed": (MODEL, ["--recompute", "true"]),
    "12 layers of width 384": ((12, 384), []),
    "10 layers of width 1024": ((10, 1024), []),
}
OFF = 1.25  # at most, as a factor either way


def run() -> Iterator[Row]:
    """Two rows a kind: seconds, and the peak memory of the child."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, more) in KINDS.items():
            where = model if isinstance(model, str) else built(Path(folder) / "x".join(map(str, model)), *model)
            told = list(_told(Path(folder) / name.replace(" ", "-"), [*SHORT, *more, "--model", str(where)]))
            plan = next(e for _, e in told if isinstance(e, ev.RunPlanned))
            peak = next(e for _, e in told if isinstance(e, ev.RunFinished)).peak_bytes
            expected, seconds = sum(p["seconds"] for p in plan.phases), told[-1][0]
            yield _row(f"forecast, {name}: seconds", expected, seconds)
            yield _row(f"forecast, {name}: peak GB", plan.peak_bytes / 1e9, peak / 1e9)


def _row(name: str, expected: float, found: float) -> Row:
    off = max(expected / found, found / expected)
    return row(name, [off], OFF, "lower", expected=round(expected, 2), measured=round(found, 2))


def _told(folder: Path, flags: list[str]) -> Iterator[tuple[float, ev.Event]]:
    command = [sys.executable, "-m", "trsp_core", "run", *flags, "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield from ((at, event) for _, at, event in Run(folder).read()[0])


def built(folder: Path, n_layers: int, width: int) -> Path:
    """A Llama-shaped model with random weights and the default model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = libraries.load_tokenizer(catalog.locate(MODEL))
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": n_layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=True, **shape, **heads
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
