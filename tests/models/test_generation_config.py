"""A model's own generation config plays no part in what a run does by itself, and is in the export as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tests import tiny
from trsp_core.data import blocks
from trsp_core.evaluation import generation, perplexity, saving, stock_process
from trsp_core.models import loading
from trsp_core.pruning import engine, validate
from trsp_core.schema import events
from trsp_core.surgery import discovery, quantization, removal

# For each field a value that a file can hold and that transformers loads: odd, and of effect where it is heeded.
ODD = {
    "max_length": 3,
    "max_new_tokens": 1,
    "min_length": 60,
    "min_new_tokens": 50,
    "early_stopping": True,
    "max_time": 1e-6,
    "stop_strings": ["e", " "],
    "do_sample": True,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 4,
    "temperature": 7.5,
    "top_k": 3,
    "top_p": 0.2,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "length_penalty": -4.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(3, 100)],
    "renormalize_logits": True,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1, 9.0],
    "suppress_tokens": list(range(3, 100)),
    "begin_suppress_tokens": list(range(3, 100)),
    "sequence_bias": [[[7], 1000.0]],
    "token_healing": True,
    "guidance_scale": 9.0,
    "watermarking_config": {"bias": 1000.0, "greenlist_ratio": 0.1},
    "num_return_sequences": 1,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 9,
    "bos_token_id": 9,
    "eos_token_id": list(range(tiny.V)),
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 9,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "prompt_lookup_num_tokens": 4,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 2,
    "target_lookbehind": 2,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "odd",
    "disable_compile": True,
    "continuous_batching_config": {"block_size": 8},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 5.0,
    "num_beam_groups": 3,
    "constraints": ["odd"],
    "force_words_ids": [[7]],
    "prefill_chunk_size": 2,
    "compile_config": None,  # transformers loads no model whose file holds one
}
OWN = {"transformers_version", "_from_model_config"}  # what transformers writes there itself
TEXT = "The river crosses the garden"
SETTINGS = {"model": "tiny", "threads": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint whose generation config says nothing."""
    folder = tiny.save(tmp_path_factory.mktemp("model"))
    (folder / "generation_config.json").write_text("{}")
    return folder


def saved(folder, target) -> dict[str, torch.Tensor]:
    """What a run keeps of the model in `folder`, less layers 1 and 3, and what it writes by itself."""
    model, tokenizer = loading.load(str(folder), device="cpu")
    stack = discovery.find(model)
    with removal.removed(stack, [1, 3]):
        saving.save(validate.from_values(SETTINGS), stack, tokenizer, target / "model", target / "proof.safetensors")
        _, text = generation.continuation(model, tokenizer, TEXT, 12)
        assert min(perplexity.time_once(model, tiny.ids(1, 6), 4)) > 0
    kept = load_file(target / "proof.safetensors")
    again = AutoModelForCausalLM.from_pretrained(target / "model")
    written = [
        stock_process.continuation(again, kept["ids"][None], len(kept["text"]), cached) for cached in (True, False)
    ]
    return kept | {"sample": torch.tensor(list(text.encode())), "again": torch.tensor(written)}


@pytest.fixture(scope="module")
def want(plain, tmp_path_factory):
    return saved(plain, tmp_path_factory.mktemp("plain"))


def test_each_field_that_transformers_knows_has_an_odd_value():
    known = {name for name in vars(GenerationConfig()) if name not in OWN}
    assert known <= set(ODD), "a new field: give it an odd value"


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("field", [name for name, value in ODD.items() if value is not None])
@pytest.mark.filterwarnings("ignore")
def test_no_field_changes_what_a_run_writes_and_the_file_keeps_it(field, place, plain, want, tmp_path):
    """In its own file, and in config.json, where older checkpoints have it."""
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    values = {field: ODD[field]}
    if place == "config.json":
        (tmp_path / "generation_config.json").unlink()
        values = json.loads((plain / place).read_text()) | values
    (tmp_path / place).write_text(json.dumps(values))
    got = saved(tmp_path, tmp_path)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    if place == "generation_config.json":
        kept = json.loads((tmp_path / "model" / place).read_text())
        told = (
            {k: v for k, v in kept[field].items() if k in ODD[field]} if isinstance(ODD[field], dict) else kept[field]
        )
        assert told == ODD[field]


def test_a_run_to_its_proof_with_many_odd_fields(plain, tmp_path):
    """In a fresh process too, which has to agree before a run is finished."""
    names = [
        "return_dict_in_generate",
        "output_scores",
        "repetition_penalty",
        "suppress_tokens",
        "eos_token_id",
        "do_sample",
    ]
    odd = {name: ODD[name] for name in names}
    (tmp_path / "text.txt").write_text(tiny.text(600))
    model = AutoModelForCausalLM.from_pretrained(plain).eval()
    model.generation_config = GenerationConfig(**odd)
    small = {"block_length": 16, "measure_length": 16, "measure_blocks": 2, "calibration_blocks": 2, "probe_blocks": 1}
    small |= {"method": "manual", "layers": "1,3", "stage2_steps": 0, "importance_blocks": 0, "kl_blocks": 1}
    text = str(tmp_path / "text.txt")
    config = validate.from_values(SETTINGS | small | {"text": text, "heldout": text})
    told = list(engine.execute(config, tmp_path, (model, tiny.tokenizer())))
    assert isinstance(told[-1], events.RunFinished)
    assert len(load_file(tmp_path / "proof.safetensors")["text"]) == blocks.NEW_TOKENS
    kept = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {name: kept[name] for name in odd} == odd
    assert model.generation_config.repetition_penalty == ODD["repetition_penalty"], "the model keeps its own as well"


@pytest.mark.parametrize("flag", [{"return_dict": False}, {"output_hidden_states": True}, {"use_cache": False}])
def test_what_a_config_wants_to_be_answered_changes_nothing_either(flag, plain, want, tmp_path):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((plain / "config.json").read_text()) | flag))
    got = saved(tmp_path, tmp_path)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_packed_weights_spelled_out_keep_it_too():
    model = tiny.build()
    model.generation_config.eos_token_id = [2, 5]
    plain = quantization.spelled_out(discovery.find(model), torch.bfloat16)
    assert plain.generation_config.eos_token_id == [2, 5]
