"""Configs that are odd, family by family: lists as long as the model is deep that are not about layers, layers of
several kinds, heads that are tied in one place and not in another. What is removed, saved and loaded is one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests import tiny, zoo
from trsp_core.errors import TrspError, is_ours
from trsp_core.models import inspection, loading
from trsp_core.runs import recorder
from trsp_core.runs.store import Store
from trsp_core.schema.config import RunConfig
from trsp_core.surgery import discovery, removal

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256}
EVERY_OTHER = ["conv", "full_attention"] * 4
# Model type, fields of its config, layers to remove, and lists of the config that stay as they are.
ODD: dict[str, tuple[str, dict[str, Any], list[int], tuple[str, ...]]] = {
    "five layers, five multipliers": ("falcon_h1", {"num_hidden_layers": 5}, [1, 3], ("ssm_multipliers",)),
    "two layers, two multipliers": ("falcon_h1", {"num_hidden_layers": 2}, [1], ("mlp_multipliers", "time_step_limit")),
    "two layers, two limits": ("mamba2", {"num_hidden_layers": 2}, [0], ("time_step_limit",)),
    "two layers of a hybrid": (
        "granitemoehybrid",
        {"num_hidden_layers": 2, "layer_types": ["mamba", "mamba"]},
        [0],
        ("time_step_limit",),
    ),
    "two layers and attention": (
        "bamba",
        {"num_hidden_layers": 2, "attn_layer_indices": []},
        [1],
        ("time_step_limit",),
    ),
    "as many languages as layers": ("llama", {"languages": list("abcdefgh")}, [1, 4], ("languages",)),
    "as many ends as layers": ("llama", {"eos_token_id": list(range(2, 10))}, [1, 4], ("eos_token_id",)),
    "as many factors as layers": (
        "phi3",
        {
            "num_hidden_layers": 4,
            "rope_parameters": LONGROPE | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
        [1, 2],
        (),
    ),
    "kinds in a pattern of its own": ("lfm2", {"layer_types": EVERY_OTHER}, [1, 4], ()),
    "all attend, told by number": ("lfm2", {}, [0, 5], ()),
    "kinds by pairs": ("gpt_neo", {"num_layers": 6, "attention_types": [[["global"], 2], [["local"], 4]]}, [0, 5], ()),
    "kinds that the depth does not tell": (
        "nemotron_h",
        {"layers_block_type": ["mamba", "attention", "mlp"] * 2},
        [2],
        (),
    ),
    "kinds by period": ("recurrent_gemma", {}, [1, 4], ()),
    "dense at the start": ("kimi_linear", {"first_k_dense_replace": 3}, [1, 4], ()),
    "no rotation every third layer": ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1, 0, 1, 1]}, [2, 4], ()),
    "all layers sliding": (
        "gemma2",
        {"layer_types": ["sliding_attention"] * 8, "query_pre_attn_scalar": 8},
        [1, 4],
        (),
    ),
    "experts in some layers": ("llama4_text", {"moe_layers": [1, 4, 6]}, [0, 4], ()),
    "some layers without experts": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3, 4, 5, 6, 7]}, [0, 4], ()),
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids(), use_cache=False).logits


@pytest.mark.parametrize("case", ODD)
def test_what_is_removed_and_saved_is_what_stock_transformers_loads(case, tmp_path):
    model_type, fields, gone, untouched = ODD[case]
    model = zoo.build(model_type, **fields)
    stack = discovery.find(model)
    before = stack.text_config.to_dict()
    with removal.removed(stack, gone):
        expected = logits(model)
        model.save_pretrained(tmp_path)
        for name in untouched:
            assert list(getattr(stack.text_config, name)) == list(before[name])
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert torch.allclose(logits(loaded.eval()), expected, atol=1e-4)
    assert stack.text_config.to_dict() == before
    tiny.tokenizer().save_pretrained(tmp_path)
    assert inspection.read(tmp_path, case).n_layers == len(stack.layers) - len(gone)


# -- heads and embeddings


def changed(folder: Path, head: torch.Tensor | None, tied: bool) -> None:
    """Let config.json say whether the head is tied, and the file hold `head`, or none."""
    file = folder / "model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if name != "lm_head.weight"}
    save_file(weights | ({} if head is None else {"lm_head.weight": head}), file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "falcon"])
def test_a_head_that_is_stored_apart_stays_apart_whatever_the_config_says(model_type, tmp_path):
    folder = tiny.save(tmp_path / "model", model_type)
    head = torch.randn(tiny.V, tiny.D, generator=torch.Generator().manual_seed(7))
    changed(folder, head, tied=True)
    model, _ = loading.load(str(folder))
    with removal.removed(discovery.find(model), [1]):
        expected = logits(model)
        model.save_pretrained(tmp_path / "kept")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert torch.equal(kept.get_output_embeddings().weight, head)
    assert kept.config.tie_word_embeddings is False
    assert torch.equal(logits(kept.eval()), expected)


def test_a_head_that_is_tied_and_stored_twice_stays_tied(tmp_path):
    folder = tiny.save(tmp_path / "model", "gpt2")
    changed(folder, load_file(folder / "model.safetensors")["transformer.wte.weight"].clone(), tied=True)
    model, _ = loading.load(str(folder))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_a_head_that_is_not_there_is_refused_with_what_to_write(tmp_path):
    folder = tiny.save(tmp_path / "model", "gpt2")
    changed(folder, None, tied=False)
    with pytest.raises(TrspError, match=r"lm_head\.weight") as refused:
        loading.load(str(folder))
    assert "tie_word_embeddings true" in refused.value.remedy
    changed(folder, None, tied=True)
    assert loading.load(str(folder))


# -- models that bring code which transformers has


def test_a_native_model_that_names_code_of_its_own_is_loaded_without_and_kept_without(tmp_path):
    """As Phi-3 was published."""
    folder = tiny.save(tmp_path / "model", "phi3")
    plain = shutil.copytree(folder, tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "evil.Model"}}
    config |= {"quantization_config": None, "architectures": None}
    (folder / "config.json").write_text(json.dumps(config))
    said = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"auto_map": {"AutoTokenizer": [None, "evil.T"]}}))
    for file in ("configuration_phi3.py", "evil.py"):
        (folder / file).write_text("raise SystemExit('this code was run')")
    model, tokenizer = loading.load(str(folder))
    assert torch.equal(logits(model), logits(loading.load(str(plain))[0]))
    for kept in (model, tokenizer):
        kept.save_pretrained(tmp_path / "kept")
    assert all("auto_map" not in file.read_text("utf-8") for file in (tmp_path / "kept").glob("*.json"))


# -- whose fault it is


def test_an_error_in_our_own_code_is_no_refusal_of_the_model(tiny_model, monkeypatch):
    def broken(model: nn.Module) -> None:
        raise AttributeError("'NoneType' object has no attribute 'data'")

    monkeypatch.setattr("trsp_core.surgery.quantization.settle", broken)
    with pytest.raises(AttributeError, match="NoneType"):
        loading.load(str(tiny_model))


def test_a_tokenizer_that_cannot_be_read_is_told_as_such(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(TrspError, match="tokenizer") as refused:
        loading.load(str(folder))
    assert "tokenizer" in refused.value.remedy


def test_memory_that_is_short_is_told_as_such(tiny_model, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(RuntimeError, match="allocate memory"):
        loading.load(str(tiny_model))


def test_a_run_whose_memory_runs_out_in_torch_says_so(tmp_path):
    class OutOfMemoryError(RuntimeError):
        """As torch calls a GPU's."""

    def events(error: Exception):
        raise error
        yield

    for n, error in enumerate((OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"))):
        state = recorder.record(Store(tmp_path / str(n)).create(RunConfig()), events(error))
        assert state.failure.message == "The machine ran out of memory."
        assert state.failure.trace == ""


def test_errors_are_told_apart_by_who_raised_them():
    def caught(call, *arguments) -> Exception:
        try:
            call(*arguments)
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert is_ours(caught(inspection.header, None)), "an AttributeError in a line of ours"
    assert not is_ours(caught(json.loads, "{")), "a library's"
    assert not is_ours(caught(inspection.header, Path("/nowhere/at/all"))), "the system's"
