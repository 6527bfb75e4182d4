"""What llama.cpp would take the kept layers for, against the pattern written out, and the words that say so."""

import pytest

from tests import tiny
from trsp_core.export import gguf_layer_kinds
from trsp_core.surgery import discovery, removal

SLIDING, FULL = "sliding_attention", "full_attention"


def config(model_type: str, kinds: list, field: str = "layer_types", **more) -> dict:
    return {"model_type": model_type, "num_hidden_layers": len(kinds), field: kinds, **more}


def alternating(step: int, n_layers: int, usual, other) -> list:
    return [other if i % step == step - 1 else usual for i in range(n_layers)]


FIXED = [
    ("gemma2", 2, "layer_types", SLIDING, FULL),
    ("gemma3", 6, "layer_types", SLIDING, FULL),
    ("gemma3_text", 6, "layer_types", SLIDING, FULL),
    ("cohere2", 4, "layer_types", SLIDING, FULL),
    ("olmo2", 4, "layer_types", SLIDING, FULL),
    ("olmo3", 4, "layer_types", SLIDING, FULL),
    ("gpt_oss", 2, "layer_types", SLIDING, FULL),
    ("llama4", 4, "layer_types", "chunked_attention", FULL),
    ("llama4_text", 4, "layer_types", "chunked_attention", FULL),
    ("llama4_text", 4, "no_rope_layers", 1, 0),
    ("smollm3", 4, "no_rope_layers", 1, 0),
]


@pytest.mark.parametrize(("model_type", "step", "field", "usual", "other"), FIXED)
@pytest.mark.parametrize("gone", [(), (0,), (1,), (2, 5), (3, 4, 11), (0, 1, 2, 3), (23,)])
def test_a_layer_changes_where_its_new_place_is_of_another_kind(model_type, step, field, usual, other, gone):
    kept = [i for i in range(24) if i not in gone]
    kinds = [alternating(step, 24, usual, other)[i] for i in kept]
    want = [new for new, old in enumerate(kept) if (old % step == step - 1) != (new % step == step - 1)]
    made = config(model_type, kinds, field)
    got = gguf_layer_kinds.changed(made)
    assert sorted(layer for layers in got.values() for layer in layers) == want
    told = gguf_layer_kinds.warning(made)
    assert bool(told) == bool(want)
    if want:
        assert f"Of the {len(kept)} layers here, counted from 0, {len(want)} would change" in told
        assert gguf_layer_kinds.VERSION in told
    assert gguf_layer_kinds.changed({"model_type": "whole", "text_config": made}) == got


def test_of_ten_kept_layers_of_a_gemma_three_change():
    kept = [0, 1, 2, 3, 5, 6, 7, 8, 9, 11]
    made = config("gemma3_text", [alternating(6, 18, SLIDING, FULL)[i] for i in kept])
    assert gguf_layer_kinds.changed(made) == {
        ("full attention", "sliding attention"): [4, 9],
        ("sliding attention", "full attention"): [5],
    }
    assert "3 would change: layers 4 and 9 from full attention to sliding attention; layer 5 from sliding" in (
        gguf_layer_kinds.warning(made)
    )


def test_exaone_slides_at_64_layers_alone():
    """Elsewhere llama.cpp gives full attention with RoPE to every layer."""
    assert gguf_layer_kinds.changed(config("exaone4", alternating(4, 64, SLIDING, FULL))) == {}
    got = gguf_layer_kinds.changed(config("exaone4", alternating(4, 12, SLIDING, FULL)))
    assert sorted(layer for layers in got.values() for layer in layers) == list(range(12))
    assert {there for _, there in got} == {"full attention with RoPE"}
    assert gguf_layer_kinds.warning(config("exaone4", [FULL] * 12)) == "", "the small ones slide nowhere"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_slides_nowhere(model_type):
    assert gguf_layer_kinds.changed(config(model_type, [FULL] * 3)) == {}
    assert gguf_layer_kinds.changed(config(model_type, [FULL, SLIDING])) == {
        ("sliding attention", "full attention"): [1]
    }


@pytest.mark.parametrize(("model_type", "depth", "scalar"), [("gemma2", 46, 144), ("gemma3_text", 62, 168)])
def test_the_scale_of_the_27b_goes_by_the_number_of_layers(model_type, depth, scalar):
    """Its scores are divided by the root of width over heads; all others by that of the width of a head, 128 here."""
    sizes = {"query_pre_attn_scalar": scalar, "head_dim": 128, "hidden_size": 32 * scalar, "num_attention_heads": 32}
    step = 2 if model_type == "gemma2" else 6
    whole = config(model_type, alternating(step, depth, SLIDING, FULL), **sizes)
    assert gguf_layer_kinds.warning(whole) == ""
    told = gguf_layer_kinds.warning(config(model_type, alternating(step, 4 * step, SLIDING, FULL), **sizes))
    assert f"the root of 128, not of {scalar}" in told
    assert "would change" not in told


def test_what_was_not_looked_up_is_said_to_be_unknown():
    assert "not checked" in gguf_layer_kinds.warning(config("novel", [FULL, "linear_attention"]))
    assert "not checked" in gguf_layer_kinds.warning({"model_type": "novel", "mlp_only_layers": [1]})
    for plain in (
        config("novel", [FULL, FULL]),
        {"model_type": "llama"},
        {"model_type": "novel", "mlp_only_layers": []},
    ):
        assert gguf_layer_kinds.warning(plain) == ""


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_config_as_it_is_saved_can_be_read(family):
    """A dense model as transformers makes it is what the pattern is for; where layers go, kinds move."""
    model = tiny.build(family)
    stack = discovery.find(model)
    whole = gguf_layer_kinds.warning(model.config.to_dict())
    assert (whole != "") == (family in ("qwen3", "qwen2_moe", "qwen3_moe")), whole
    with removal.removed(stack, [1]):
        told = gguf_layer_kinds.warning(model.config.to_dict())
    moved = ("gemma2", "qwen3", "smollm3", "qwen2_moe", "qwen3_moe")
    assert (told != "") == (family in moved), told
