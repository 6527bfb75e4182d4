"""Packed weights (bitsandbytes): what they hold, that gradients through them are right, whole runs on them, what is
kept of them; and layers that are computed again on the way back."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests import tiny
from tests.pruning.test_controls import TINY
from trsp_core.errors import TrspError
from trsp_core.evaluation import losses, measurements, perplexity, saving
from trsp_core.export import checkpoint as export
from trsp_core.models import inspection, loading
from trsp_core.perf import compilation
from trsp_core.pruning import engine, lab, methods, validate
from trsp_core.pruning.stage2 import transfer
from trsp_core.runs import recorder
from trsp_core.runs.store import Store
from trsp_core.schema import config as configs
from trsp_core.schema import events, run_state
from trsp_core.surgery import discovery, hooks, lora, quantization, removal

PACKED = list(configs.PACKED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"))


def packed(folder, precision):
    model, tokenizer = loading.load(str(folder), precision, "cpu")
    return discovery.find(model), tokenizer


@pytest.mark.parametrize("precision", PACKED)
def test_sizes_are_those_of_the_numbers_that_packed_weights_stand_for(folder, precision):
    stack, _ = packed(folder, precision)
    whole = perplexity.parameter_bytes(tiny.build())
    count, size = perplexity.parameter_bytes(stack.model)
    assert count == whole[0]
    assert size < 0.75 * whole[1]
    assert measurements.number_format(stack.model) == f"{precision}, products in float32"
    layer = perplexity.parameter_bytes(stack.layers[0])
    with removal.removed(stack, [1]):
        assert perplexity.parameter_bytes(stack.model) == (count - layer[0], size - layer[1])


@pytest.mark.parametrize("precision", PACKED)
def test_gradients_of_the_layer_weights_are_those_of_the_unpacked_model(folder, precision):
    """Also after passes without gradients, which lay nf4 weights out anew on some CPUs."""
    stack, _ = packed(folder, precision)
    plain = discovery.find(quantization.spelled_out(stack, torch.float32))
    ids = tiny.ids(2, 16)
    found = {}
    for name, each in (("packed", stack), ("plain", plain)):
        each.model.requires_grad_(False)
        with torch.inference_mode():
            each.model(input_ids=ids, use_cache=False)
        weights = torch.full((tiny.L,), 0.9, requires_grad=True)
        with hooks.gated(each, weights, "branch", range(tiny.L)):
            losses.next_token_loss(each.model(input_ids=ids, use_cache=False).logits, ids).mean().backward()
        found[name] = weights.grad
    print(found)
    exact = precision == "nf4"  # int8 rounds inputs, too
    assert torch.allclose(found["packed"], found["plain"], rtol=1e-3 if exact else 0.2, atol=1e-4 if exact else 0.03)
    assert found["plain"].abs().min() > 1e-5


@pytest.mark.parametrize("precision", PACKED)
def test_a_whole_run_trains_adapters_and_keeps_an_ordinary_model(folder, text, precision, tmp_path):
    values = {**TINY, "model": str(folder), "text": text, "heldout": text, "precision": precision, "adapter_rank": 2}
    config = validate.from_values(values | {"stage2_steps": 4, "adapter_lr": 1e-2, "save_model": True})
    told = list(engine.execute(config, tmp_path))
    folded = run_state.fold(run_state.RunState(), [(n, float(n), e) for n, e in enumerate(told)])
    assert folded.ended == "finished"
    removed = next(e for e in told if isinstance(e, events.LayersRemoved))
    sizes = inspection.read(folder, "tiny").layer_parameters
    assert removed.parameters_before - removed.parameters == sum(sizes[i] for i in removed.removed)
    assert next(e for e in told if isinstance(e, events.ModelLoaded)).dtype.startswith(precision)
    kept = inspection.read(tmp_path / "model", "pruned")
    assert (kept.n_layers, kept.parameters) == (tiny.L - len(removed.removed), removed.parameters)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert stock.dtype == torch.bfloat16
    assert torch.isfinite(stock(input_ids=tiny.ids()).logits).all()


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("save_as", ["merged", "adapters"])
def test_what_is_kept_says_what_the_model_in_memory_says(folder, text, precision, save_as, tmp_path):
    values = {**TINY, "model": str(folder), "text": text, "heldout": text, "precision": precision, "save_as": save_as}
    config = validate.from_values(values | {"adapter_rank": 2, "adapter_lr": 1e-2, "stage2_steps": 4})
    stack, tokenizer = packed(folder, precision)
    stack.model.requires_grad_(False)
    bench = lab.Lab(stack, tiny.ids(4, 16), config)
    before = stack.model(input_ids=tiny.ids(), use_cache=False).logits.detach()
    with lora.adapted(stack, 2, 0), torch.no_grad():
        with torch.enable_grad():
            list(transfer(bench, config, [1, 3]))
        assert lora.of(stack)  # packed weights keep theirs
        with removal.removed(stack, [1, 3]):
            said = stack.model(input_ids=tiny.ids(), use_cache=False).logits
            saving.save(config, stack, tokenizer, tmp_path / "model")
            assert torch.equal(said, stack.model(input_ids=tiny.ids(), use_cache=False).logits)
    assert torch.equal(before, stack.model(input_ids=tiny.ids(), use_cache=False).logits)  # the adapters are gone
    with torch.no_grad():
        if save_as == "merged":
            stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
            near = 0.05
        else:
            from peft import PeftModel

            base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
            quantization.settle(base)  # its own layout for inference wants widths of 64 and more
            stock = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
            near = 1e-3
        again = stock(input_ids=tiny.ids(), use_cache=False).logits.float()
    assert (again - said).abs().mean() < near * said.abs().mean() * (3 if precision == "int8" else 1)


def test_what_packed_weights_cannot_do_is_said_at_once():
    with pytest.raises(TrspError) as caught:
        validate.from_values({"precision": "nf4", "learn_weights": True, "method": "taylor"})
    assert {p.knob for p in caught.value.problems} >= {"learn_weights", "adapter_rank", "method"}
    assert validate.from_values({}, "4-bit").precision == "nf4"
    validate.from_values({"precision": "int8", "stage2_steps": 0})


def test_a_packed_model_is_expected_to_take_less(folder):
    facts = inspection.read(folder, "tiny")
    found = [inspection.weight_bytes(facts, p) for p in ("nf4", "int8", "float32")]
    assert found == sorted(found)
    stack, _ = packed(folder, "int8")
    assert found[1] == pytest.approx(perplexity.parameter_bytes(stack.model)[1], rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_layers_computed_again_give_the_same_gradients(family, text):
    values = {"method": "manual", "layers": "1,3", "stage2_steps": 3, "anneal": 0.5, "lambda_2": 1.0}
    found = []
    for recompute in (False, True):
        config = validate.from_values({**TINY, **values, "recompute": recompute})
        stack = discovery.find(tiny.build(family))
        steps = list(transfer(lab.Lab(stack, tiny.ids(8, 16), config), config, [1, 3]))
        found.append((steps, [p.detach().clone() for p in stack.model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("method", ["trsp", "masks"])
def test_layers_computed_again_are_chosen_alike(method, monkeypatch):
    """To the bit; and they are computed again on the way back, so that the pass keeps little."""
    kept, told = [], []
    for recompute in (False, True):
        config = validate.from_values({**TINY, "method": method, "stage1_steps": 4, "recompute": recompute})
        bench, most = lab.Lab(discovery.find(tiny.build()), tiny.ids(8, 16), config), [0]
        real = bench.model.forward

        def measured(real=real, most=most, **inputs):
            held = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t.numel()), t)[1], lambda t: t):
                value = real(**inputs)
            most[0] = max(most[0], sum(held))
            return value

        monkeypatch.setattr(bench.model, "forward", measured)
        told.append(list(methods.get(method).choose(bench, config, 2)))
        kept.append(most[0])
        assert not any("forward" in vars(layer) for layer in bench.stack.layers)
    assert told[0] == told[1]
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"adapter_rank": 2}, {"recompute": True, "anneal": 0.5}], ids=str)
def test_fused_layers_give_the_same_gradients(family, settings, monkeypatch):
    """As on a GPU, but for the last stage of compiling, which is for devices; and in one pass."""
    fused, found = compilation.fused, []
    monkeypatch.setattr(lab.Lab, "lanes", lambda self, rows: [self])
    step = lab.Lab.stepping
    for wanted in (contextlib.nullcontext, lambda stack: fused(stack, "aot_eager")):

        @contextlib.contextmanager
        def stepping(self, wanted=wanted):
            with wanted(self.stack), step(self):
                yield

        monkeypatch.setattr(lab.Lab, "stepping", stepping)
        config = validate.from_values({**TINY, "lambda_2": 1.0, **settings})
        bench = lab.Lab(discovery.find(tiny.build(family)), tiny.ids(8, 16), config)
        s = torch.full((bench.n_layers,), 0.9, requires_grad=True)
        with bench.learning([]), bench.stepping(), bench.gated(s, "branch", [0, 1, 3]), bench.skipped([2]):
            (slope,) = torch.autograd.grad(bench.lm_loss(tiny.ids()), s)
        steps = list(transfer(bench, config, [1, 3]))
        assert not any("forward" in vars(layer) for layer in bench.stack.layers)
        found.append([*slope.tolist(), *(n for e in steps for n in (e.lm_loss, e.penalty, *e.gaps))])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("save_as", "transfer"), [("merged", "penalty"), ("adapters", "refit")])
def test_an_export_of_a_packed_run_is_proved(text, save_as, transfer, tmp_path):
    """As wide as bitsandbytes' own layout for inference wants it, which the fresh process uses. A refit leaves the maps
    that it changes unpacked."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=tiny.V, **shape)).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    values = {**TINY, "model": str(tmp_path / "base"), "text": text, "heldout": text, "precision": "nf4"}
    config = validate.from_values(
        {**values, "adapter_rank": 2, "adapter_lr": 1e-2, "ratio": 0.25, "save_as": save_as, "transfer": transfer}
    )
    run = Store(tmp_path / "runs").create(config)
    assert recorder.record(run, engine.execute(config, run.folder)).ended == "finished"
    assert export.formats(run) == (("bfloat16", "float32", "float16") if save_as == "merged" else ())
    *_, last = export.export(run, tmp_path / "taken")
    assert "fresh process" in last.message
    assert (tmp_path / "taken" / "adapter").is_dir() == (save_as == "adapters")
    told = (tmp_path / "taken" / "README.md").read_text("utf-8")
    assert "nf4, products in float32" in told
    assert ("Measured on weights packed as nf4" in told) == (save_as == "merged")


def test_bfloat16_falls_back_or_comes_with_a_sentence(monkeypatch):
    assert loading.settle_precision("float32", "cpu") == ("float32", "")
    for units in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda units=units: units)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        precision, note = loading.settle_precision("bfloat16", "cpu")
        assert precision == "bfloat16"
        assert bool(note) is not units
    monkeypatch.setattr(loading, "pick_device", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    precision, note = loading.settle_precision("bfloat16", "cuda")
    assert precision == "float32"
    assert "no bfloat16" in note


def test_a_model_too_large_for_one_gpu_is_spread_over_several(monkeypatch):
    assert loading.fits_one(10**15, "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**10, 10**10))
    assert loading.fits_one(7 * 10**9, "cuda")
    assert not loading.fits_one(9 * 10**9, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("precision", PACKED)
def test_the_default_model_is_taken_packed(precision):
    """int8 picks its outliers from all tokens at once, so that a later token moves earlier logits a little."""
    stack, _ = packed("smollm2-135m", precision)
    assert len(stack.layers) == 30
