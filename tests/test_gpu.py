"""What needs a CUDA device (marker gpu), and the benchmark for one, tried small on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, steps
from tests import tiny
from tests.test_controls import TINY, text  # noqa: F401 - a fixture
from trsp_core import config as configs
from trsp_core import engine, events, load

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_the_benchmark_times_every_kind_of_step(precision, monkeypatch):
    monkeypatch.setattr(gpu, "LENGTH", 16)
    monkeypatch.setattr(gpu, "rate", lambda device: 1.0)
    found = list(gpu.measured("tiny", SHAPE, precision, "cpu"))
    kinds = {r.benchmark.partition(", ")[2].partition(":")[0] for r in found}
    assert kinds == set(steps.PASSES) - ({"stage 2"} if precision == "nf4" else set())
    assert all(r.ratio > 0 and r.facts["tokens_per_second"] > 0 for r in found)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4", "int8"])
def test_a_whole_run_on_the_gpu(precision, text, tmp_path):  # noqa: F811
    folder = tiny.save(tmp_path / "base")
    values = {**TINY, "model": str(folder), "text": text, "heldout": text, "device": "cuda", "precision": precision}
    config = configs.from_values(values | ({"adapter_rank": 2} if precision in configs.PACKED else {}))
    told = list(engine.execute(config, tmp_path))
    assert isinstance(told[-1], events.RunFinished)
    assert next(e for e in told if isinstance(e, events.ModelLoaded)).device.startswith("cuda")


@pytest.mark.gpu
def test_the_layers_say_the_same_on_both_devices(tmp_path):
    folder, ids = tiny.save(tmp_path), tiny.ids()
    said = [load.load(str(folder), device=d)[0](input_ids=ids.to(d)).logits.cpu() for d in ("cpu", "cuda")]
    assert torch.allclose(*said, atol=1e-3)
