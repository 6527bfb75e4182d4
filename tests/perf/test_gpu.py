"""What needs a CUDA device (marker gpu), and the benchmark for one, tried small on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, steps
from tests import tiny
from tests.pruning.test_controls import TINY
from tests.pruning.test_methods import ALL, drain, lab_of
from tests.runs import test_resume
from trsp_core.evaluation.layer_removal import Path
from trsp_core.export import checkpoint
from trsp_core.models import loading
from trsp_core.perf import cuda_graphs
from trsp_core.pruning import engine, methods, validate
from trsp_core.pruning.stage2 import transfer
from trsp_core.runs import recorder
from trsp_core.runs.store import Store
from trsp_core.schema import config as configs
from trsp_core.schema import events
from trsp_core.schema import messages as an
from trsp_core.surgery import discovery, removal, training
from trsp_core.training import checkpointing
from trsp_core.workbench import model_cache, side_by_side

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@pytest.fixture(autouse=True)
def _no_failed_recording_before(monkeypatch):
    monkeypatch.setattr(cuda_graphs.Recorded, "spoiled", "")


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_the_benchmark_times_every_kind_of_step(precision, monkeypatch):
    monkeypatch.setattr(gpu, "LENGTH", 16)
    monkeypatch.setattr(gpu, "rate", lambda device: 1.0)
    found = list(gpu.measured("tiny", SHAPE, precision, "cpu"))
    kinds = {r.benchmark.partition(", ")[2].partition(":")[0] for r in found}
    assert kinds == set(steps.PASSES) - ({"stage 2"} if precision == "nf4" else set())
    assert all(r.ratio > 0 and r.facts["tokens_per_second"] > 0 for r in found)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_block_is_one_sequence_for_every_family(family):
    model = tiny.build(family)
    with torch.no_grad():
        asked = model(input_ids=tiny.ids(), use_cache=False).logits
        with cuda_graphs.one_sequence_a_block():
            told = model(input_ids=tiny.ids(), use_cache=False).logits
    assert torch.equal(asked, told)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4", "int8"])
def test_a_whole_run_on_the_gpu(precision, text, tmp_path):
    folder = tiny.save(tmp_path / "base")
    values = {**TINY, "model": str(folder), "text": text, "heldout": text, "device": "cuda", "precision": precision}
    config = validate.from_values(values | ({"adapter_rank": 2} if precision in configs.PACKED else {}))
    told = list(engine.execute(config, tmp_path))
    assert isinstance(told[-1], events.RunFinished)
    assert next(e for e in told if isinstance(e, events.ModelLoaded)).device.startswith("cuda")


@pytest.mark.gpu
def test_the_layers_say_the_same_on_both_devices(tmp_path):
    folder, ids = tiny.save(tmp_path), tiny.ids()
    said = [loading.load(str(folder), device=d)[0](input_ids=ids.to(d)).logits.cpu() for d in ("cpu", "cuda")]
    assert torch.allclose(*said, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ALL)
def test_every_method_chooses_the_same_on_both_devices(method):
    chosen = []
    for device in ("cpu", "cuda"):
        lab, config = lab_of(method, tiny.build(n_layers=6).to(device))
        chosen.append(drain(methods.get(method).choose(lab, config, 2))[1])
    assert chosen[0] == chosen[1]


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_family_is_measured_and_pruned_the_same_on_both_devices(family):
    found = []
    for device in ("cpu", "cuda"):
        stack = discovery.find(tiny.build(family).to(device))
        path = Path(stack, tiny.ids().to(device))
        figures = [path.figures(frozenset(removed)) for removed in ((), (1, 3))]
        with removal.removed(stack, [1, 3]), torch.no_grad():
            logits = stack.model(input_ids=tiny.ids().to(device), use_cache=False).logits.cpu()
        found.append(([n for f in figures for n in (f.loss, f.kl)], logits))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-3)
    assert torch.allclose(found[0][1], found[1][1], atol=2e-3)


STAGE_2 = [
    {},
    {"adapter_rank": 2},
    {"recompute": True},
    {"anneal": 0.5},
    {"penalty": "sum"},
    {"penalty_reach": "model"},
    {"distil": 0.5},
    {"distil": 0.5, "distil_from": "states"},
    {"fuse": True},
    {"fuse": True, "adapter_rank": 2},
    {"fuse": True, "recompute": True},
]


def two_stages(model, settings):
    """Every figure that both stages tell of a model."""
    lab, config = lab_of("trsp", model, **{"stage1_steps": 6, "stage2_steps": 8, "lambda_2": 2.0, **settings})
    if config.distil:
        lab.teacher = discovery.find(tiny.build(n_layers=6, seed=1).to(lab.device))
    with training.learning(model, []):
        first, chosen = drain(methods.get("trsp").choose(lab, config, 2))
    stepped = [e for e in first if isinstance(e, events.StageOneStepped)]
    second = [n for e in transfer(lab, config, chosen) for n in (e.lm_loss, e.penalty, *e.gaps)]
    with torch.no_grad():
        last = model(input_ids=tiny.ids().to(lab.device), use_cache=False).logits
    return [n for e in stepped for n in (e.lm_loss, *e.weights)] + second, last.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", STAGE_2, ids=str)
def test_recorded_steps_are_those_that_are_asked_for_one_by_one(settings, monkeypatch):
    made, plain = [], cuda_graphs.Recorded.__init__

    def noted(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(cuda_graphs.Recorded, "__init__", noted)
    recorded = two_stages(tiny.build(n_layers=6).to("cuda"), settings)
    assert len(made) == (4 if settings.get("anneal") else 3)
    assert all(one.graph is not None for one in made), [one.refusal for one in made]
    monkeypatch.setattr(cuda_graphs.Recorded, "__call__", lambda self, ids: self.work(ids))
    asked = two_stages(tiny.build(n_layers=6).to("cuda"), settings)
    assert recorded[0] == pytest.approx(asked[0], rel=1e-5, abs=1e-6)
    assert torch.allclose(recorded[1], asked[1], atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_family_goes_through_both_stages_alike_on_both_devices(family):
    """Also those that cannot be recorded, since they wait for the GPU to say where tokens go."""
    settings = {"stage1_steps": 3, "stage2_steps": 3}
    found = [two_stages(tiny.build(family).to(device), settings) for device in ("cpu", "cuda")]
    assert found[0][0] == pytest.approx(found[1][0], rel=5e-3, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen3_moe"])
def test_fused_layers_go_the_same_way(family):
    found = [
        two_stages(tiny.build(family).to("cuda"), {"stage1_steps": 3, "stage2_steps": 3, "fuse": fuse})
        for fuse in (False, True)
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=5e-3, abs=1e-4)


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_not_recorded_and_goes_on():
    model, ids = tiny.build().to("cuda"), tiny.ids().to("cuda")
    recorded = cuda_graphs.Recorded(lambda ids: torch.full((1,), float(ids.sum().item()), device="cuda"), model)
    assert [recorded(ids + n).item() for n in range(4)] == [(ids + n).sum().item() for n in range(4)]
    assert "test_gpu.py" in recorded.refusal
    assert torch.randn(3, device="cuda").isfinite().all(), "the device's random numbers go on too"
    again = cuda_graphs.Recorded(lambda ids: ids.sum().view(1), model)
    assert [again(ids + n).item() for n in range(4)] == [(ids + n).sum().item() for n in range(4)]
    assert not again.refusal

    def fails(ids):
        return ids.sum().view(1) * (2 if torch.cuda.is_current_stream_capturing() and ids.sum().item() else 1)

    unforeseen, stream = cuda_graphs.Recorded(fails, model), torch.cuda.current_stream()
    assert [unforeseen(ids + n).item() for n in range(4)] == [(ids + n).sum().item() for n in range(4)]
    assert unforeseen.refusal
    assert torch.cuda.current_stream() == stream
    assert torch.randn(3, device="cuda").isfinite().all(), "after a recording that failed too"
    assert cuda_graphs.Recorded(fails, model)(ids) == ids.sum()
    assert cuda_graphs.Recorded.spoiled


@pytest.mark.gpu
@pytest.mark.parametrize("settings", STAGE_2, ids=str)
def test_stage_2_goes_the_same_way_on_both_devices(settings):
    found = []
    for device in ("cpu", "cuda"):
        lab, config = lab_of("trsp", tiny.build(n_layers=6).to(device), **{"stage2_steps": 4, **settings})
        lab.teacher = discovery.find(tiny.build(n_layers=6, seed=1).to(device))
        found.append([n for e in transfer(lab, config, [1, 3]) for n in (e.lm_loss, e.penalty, *e.gaps)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def near(found, wanted):
    """Equal but for the rounding of floats: a step that was recorded adds up in another order than one that was not."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(near(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(near, found, wanted))
    return found == (pytest.approx(wanted, rel=1e-3, abs=1e-4) if isinstance(wanted, float) else wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("case", test_resume.CASES)
def test_an_interrupted_run_ends_the_same_on_the_gpu(case, text, tmp_path, monkeypatch):
    plain = tiny.build
    monkeypatch.setattr(tiny, "build", lambda *args, **how: plain(*args, **how).to("cuda"))
    monkeypatch.setattr(checkpointing, "PATIENCE", 0.0)
    test_resume.ends_the_same(case, text, tmp_path, (0.3, 0.6, 0.9), near)


@pytest.mark.gpu
@pytest.mark.parametrize("removed", [[], [1, 3]])
def test_columns_on_the_gpu_equal_generate(removed, tmp_path):
    held, variant = model_cache.ModelCache(), an.Variant(str(tiny.save(tmp_path)), removed)
    request = an.Generate([variant], "The river crosses", new_tokens=12, trace=False)
    found = [a.token for a in side_by_side.stream(request, held) if isinstance(a, an.TokenGenerated)]
    whole = held.take(an.Variant(variant.model))
    assert whole.stack.model.device.type == "cuda"
    ids, _ = side_by_side.encode(whole, request.prompt, False)
    with removal.removed(whole.stack, removed), torch.inference_mode():
        want = whole.stack.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found == want


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_a_model_pruned_on_the_gpu_is_exported_with_proof(precision, text, tmp_path):
    values = {**TINY, "model": str(tiny.save(tmp_path / "base")), "text": text, "heldout": text, "save_model": True}
    packed = {"adapter_rank": 2} if precision == "nf4" else {}
    run = Store(tmp_path / "runs").create(validate.from_values(values | packed | {"precision": precision}))
    recorder.record(run, engine.execute(run.config(), run.folder))
    assert run.status() == "finished", run.state().failure
    assert list(checkpoint.export(run, tmp_path / "out"))[-1].fraction == 1
    assert {"proof.json", "README.md"} <= {file.name for file in (tmp_path / "out").iterdir()}
