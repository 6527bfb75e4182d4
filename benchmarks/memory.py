"""The most memory that training holds, over the bytes of the weights: stage 1, stage 2 on all of W, stage 2 with LoRA;
the first two also with layers computed again on the way back (`--recompute true`). Each in a process of its own; what
Python and its packages take before the model is loaded does not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import Row, row

MODEL, STEPS = "smollm2-135m", 4
TEXT = {"block_length": 128, "batch_blocks": 4, "calibration_blocks": 64, "measure_blocks": 4, "probe_blocks": 4}
AGAIN = {"recompute": True}
KINDS = {
    "stage 1": {},
    "stage 1, recomputed": AGAIN,
    "stage 2": {},
    "stage 2, recomputed": AGAIN,
    "stage 2, LoRA": {"adapter_rank": 8},
}
AIMS = {"stage 1": 1.6, "stage 1, recomputed": 1.6, "stage 2": 4.4, "stage 2, recomputed": 4.4}


def run() -> Iterator[Row]:
    """Five rows; LoRA's is over all of W."""
    found = {name: _told(name) for name in KINDS}
    for name, aim in AIMS.items():
        grown, weights = found[name]
        yield row(f"{name}: peak memory over the weights", [grown / weights], aim, "lower", **_facts(found[name]))
    ratio = found["stage 2, LoRA"][0] / found["stage 2"][0]
    yield row("stage 2, LoRA: peak memory over all of W", [ratio], 0.5, "lower", **_facts(found["stage 2, LoRA"]))


def _facts(found: tuple[int, int]) -> dict[str, int]:
    return {"peak_mb": round(found[0] / 1e6), "weights_mb": round(found[1] / 1e6), "tokens": 512}


def _told(name: str) -> tuple[int, int]:
    command = [sys.executable, "-m", "benchmarks.memory", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    grown, weights = json.loads(done.stdout.splitlines()[-1])
    return grown, weights


def grown(name: str) -> tuple[int, int]:
    """Bytes that `name` added at its peak to a process with all packages loaded, and those of the weights."""
    import psutil
    import torch

    from trsp_core import malloc
    from trsp_core.data import blocks
    from trsp_core.evaluation import perplexity
    from trsp_core.models import catalog, libraries, loading
    from trsp_core.pruning import validate
    from trsp_core.pruning.lab import Lab
    from trsp_core.pruning.methods import trsp
    from trsp_core.pruning.stage2 import transfer
    from trsp_core.surgery import discovery

    malloc.share_heaps()  # as a run does, and what it does before it trains
    libraries.load_tokenizer(catalog.locate(MODEL))
    from transformers.models.llama import modeling_llama  # noqa: F401 - what a model's class brings along

    before = psutil.Process().memory_info().rss
    model, tokenizer = loading.load(MODEL, device="cpu")
    model.requires_grad_(False)
    config = validate.from_values({**TEXT, "stage1_steps": STEPS, "stage2_steps": STEPS, **KINDS[name]})
    lab = Lab(discovery.find(model), blocks.prepare(config, tokenizer).calibration, config)
    malloc.give_back()
    torch.set_num_threads(perplexity.os.cpu_count() or 1)
    steps = trsp.choose(lab, config, 1) if name.startswith("stage 1") else transfer(lab, config, list(range(14, 21)))
    for _ in steps:
        pass
    return perplexity.peak_bytes() - before, perplexity.parameter_bytes(model)[1]


if __name__ == "__main__":
    print(json.dumps(grown(sys.argv[1])))
