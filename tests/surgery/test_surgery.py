"""What surgery promises, over every family: identity at one, removal at zero, nothing left behind, a plain model."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests import tiny, zoo
from trsp_core.errors import TrspError
from trsp_core.models import architectures
from trsp_core.perf import compilation
from trsp_core.pruning import validate
from trsp_core.pruning.lab import Lab
from trsp_core.surgery import discovery, families, hooks, removal, training

GONE = [1, 3]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(params=list(tiny.CONFIGS))
def stack(request):
    return discovery.find(tiny.build(request.param))


def test_layers_are_found_by_looking(stack):
    assert len(stack.layers) == tiny.L
    assert len({type(layer) for layer in stack.layers}) == 1


def test_gates_at_one_leave_logits_bit_identical(stack):
    ids, ones = tiny.ids(), torch.ones(tiny.L)
    before = logits(stack.model, ids)
    for kind in ("branch", "output"):
        with hooks.gated(stack, ones, kind, range(tiny.L)):
            assert torch.equal(logits(stack.model, ids), before), kind


@pytest.mark.parametrize("kind", ["branch", "output"])
def test_a_gate_works_in_float32_whatever_the_models_format(kind):
    """In bfloat16 0.997 would be 0.99609, and the steps of the layer weights would be lost."""
    model, weights, seen = tiny.build().to(torch.bfloat16), torch.full((tiny.L,), 0.997), {}
    stack, layer = discovery.find(model), model.model.layers[2]
    raw = layer.register_forward_hook(lambda _, given, out: seen.update(x_in=given[0], x_out=out))
    with hooks.gated(stack, weights, kind, [2]):
        gated = layer.register_forward_hook(lambda _, given, out: seen.update(gated=out))
        logits(model, tiny.ids())
    raw.remove(), gated.remove()

    def gate(dtype):
        x_in, x_out, s = (x.to(dtype) for x in (seen["x_in"], seen["x_out"], weights[2]))
        return (torch.lerp(x_in, x_out, s) if kind == "branch" else s * x_out).bfloat16()

    assert torch.equal(seen["gated"], gate(torch.float32))
    assert not torch.equal(seen["gated"], gate(torch.bfloat16))


def test_layers_that_cannot_be_fused_are_told():
    def fails(graph, inputs):
        raise RuntimeError("no compiler")

    stack = discovery.find(tiny.build())
    with pytest.raises(TrspError, match="no compiler") as told, compilation.fused(stack, fails):
        stack.model(input_ids=tiny.ids(), use_cache=False)
    assert "--fuse false" in told.value.remedy
    assert not any("forward" in vars(layer) for layer in stack.layers)


def test_a_branch_gate_at_zero_is_removal(stack):
    ids, weights = tiny.ids(), torch.ones(tiny.L)
    weights[GONE] = 0
    with hooks.gated(stack, weights, "branch", range(tiny.L)):
        gated = logits(stack.model, ids)
    with hooks.skipped(stack, GONE):
        skipped = logits(stack.model, ids)
    with removal.removed(stack, GONE):
        removed = logits(stack.model, ids)
    assert torch.equal(gated, skipped)
    assert torch.equal(skipped, removed)
    assert not torch.allclose(removed, logits(stack.model, ids), atol=1e-3), "these layers did nothing anyway"


def test_the_model_is_untouched_afterwards_also_after_an_error(stack):
    ids, before = tiny.ids(), logits(stack.model, tiny.ids())
    config = stack.text_config.to_dict()
    for change in (
        hooks.gated(stack, torch.zeros(tiny.L), "output", range(tiny.L)),
        hooks.skipped(stack, GONE),
        removal.removed(stack, GONE),
        hooks.tapped(stack, GONE),
    ):
        with pytest.raises(KeyError), change:
            logits(stack.model, ids)
            raise KeyError
        assert torch.equal(logits(stack.model, ids), before)
    assert stack.text_config.to_dict() == config
    assert all("forward" not in layer.__dict__ for layer in stack.layers)


def test_a_removed_model_saves_and_reloads_equal(stack, tmp_path):
    ids = tiny.ids()
    with removal.removed(stack, GONE):
        before = logits(stack.model, ids)
        stack.model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True).eval()
    assert reloaded.config.get_text_config().num_hidden_layers == tiny.L - len(GONE)
    assert torch.equal(logits(reloaded, ids), before)


def test_cached_generation_equals_uncached_after_removal(stack):
    ids = tiny.ids(rows=1)
    how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with removal.removed(stack, [0, 3]):  # layer 0 too: caches read their length from the first one
        cached = stack.model.generate(ids, use_cache=True, **how)
        assert torch.equal(cached, stack.model.generate(ids, use_cache=False, **how))
    assert cached.shape[1] == ids.shape[1] + 24


def test_deletion_shrinks_parameters_by_exactly_the_layers(stack):
    count = sum(p.numel() for p in stack.model.parameters())
    layers = sum(p.numel() for i in GONE for p in stack.layers[i].parameters())
    with removal.removed(stack, GONE):
        assert sum(p.numel() for p in stack.model.parameters()) == count - layers


def test_indices_and_per_layer_lists_are_right_after_removal(stack):
    kinds = getattr(stack.text_config, "layer_types", None)
    with removal.removed(stack, GONE):
        for i, layer in enumerate(stack.layers):
            assert {m.layer_idx for m in layer.modules() if getattr(m, "layer_idx", None) is not None} <= {i}
        assert stack.text_config.num_hidden_layers == len(stack.layers)
        if kinds is not None:
            assert list(stack.text_config.layer_types) == [k for i, k in enumerate(kinds) if i not in GONE]


def test_the_named_output_modules_are_what_writes_into_the_residual_stream(stack):
    """With those parameters at zero a layer is the identity, so they are all of its outputs."""
    assert stack.outputs(2)
    ids = tiny.ids()
    with hooks.skipped(stack, [2]):
        without = logits(stack.model, ids)
    with torch.no_grad():
        for p in stack.outputs(2):
            # Gemma's norms multiply by (1 + weight)
            p.fill_(-1.0 if stack.family.outputs[0].startswith("post_") and "Gemma" in stack.family.name else 0.0)
    assert torch.allclose(logits(stack.model, ids), without, atol=1e-5)


def test_taps_see_what_enters_and_leaves(stack):
    with hooks.tapped(stack, [1, 2]) as seen:
        logits(stack.model, tiny.ids())
        assert torch.equal(seen[1][1], seen[2][0])
        assert seen[1][0].shape == (2, 12, tiny.D)


def test_restored_puts_every_weight_back():
    model = tiny.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), training.restored(model):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        raise ZeroDivisionError
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class TestRefusals:
    def test_layers_that_share_caches(self):
        model = tiny.build()
        model.config.num_kv_shared_layers = 2
        with pytest.raises(TrspError, match="reuse the key-value cache"):
            discovery.find(model)

    def test_a_family_that_is_declared_unfit(self):
        model = tiny.build()
        model.config.model_type = "gemma3n_text"
        with pytest.raises(TrspError, match="Gemma 3n"):
            discovery.find(model)

    def test_a_model_without_a_stack(self):
        model = tiny.build()
        model.model.layers = nn.ModuleList()
        model.config.num_hidden_layers = 0
        with pytest.raises(TrspError, match="No list of decoder layers"):
            discovery.find(model)

    def test_a_count_that_the_config_does_not_share(self):
        model = tiny.build("gpt2")
        model.config.n_layer = 9
        with pytest.raises(TrspError, match="says it has 9 layers"):
            discovery.find(model)

    def test_an_encoder_decoder(self):
        model = tiny.build()
        model.config.is_encoder_decoder = True
        with pytest.raises(TrspError, match="encoder-decoder"):
            discovery.find(model)

    def test_an_encoder(self):
        with pytest.raises(TrspError, match="reads the tokens that follow"):
            discovery.find(zoo.build("bert"))

    def test_the_decoder_of_an_encoder_decoder(self):
        with pytest.raises(TrspError, match="encoder-decoder"):
            discovery.find(zoo.build("bart"))

    def test_layers_that_share_weights(self):
        model = tiny.build()
        model.model.layers[3].mlp = model.model.layers[1].mlp
        with pytest.raises(TrspError, match="share weights"):
            discovery.find(model)

    def test_layers_that_take_the_tokens_that_others_pick(self):
        with pytest.raises(TrspError, match="earlier one has picked"):
            discovery.find(zoo.build("hy_v4"))

    def test_what_would_load_as_no_causal_model(self):
        with pytest.raises(TrspError, match="loads as no causal model"):
            discovery.find(zoo.build("emu3"))

    def test_values_that_a_config_cannot_give_to_fewer_layers(self):
        """GPT-2's attention may be scaled by the layer's number; a removed layer then leaves a gap in the scales."""
        model = tiny.build("gpt2", scale_attn_by_inverse_layer_idx=True)
        with pytest.raises(TrspError, match=r"layers.1.attn.scaling, 0.117\d+ or 0.176"):
            discovery.find(model)

    def test_the_inputs_of_its_own_that_a_layer_of_gemma_4_may_have(self):
        model = zoo.build("gemma4_text", hidden_size_per_layer_input=8)
        with pytest.raises(TrspError, match="per_layer"):
            discovery.find(model)

    def test_the_last_layer_that_attends(self):
        stack = discovery.find(zoo.build("bamba"))
        with removal.removed(stack, [2]):
            pass
        with pytest.raises(TrspError, match="without layers 2, 5"), removal.removed(stack, [2, 5]):
            pass
        assert len(stack.layers) == zoo.L
        assert stack.text_config.num_hidden_layers == zoo.L

    def test_a_layer_that_stays(self):
        stack = discovery.find(zoo.build("minimax"))
        with pytest.raises(TrspError, match="without layer 0"), removal.removed(stack, [0]):
            pass
        config = validate.from_values({"protect_first": 0, "protect_last": 0})
        assert 0 not in Lab(stack, tiny.ids(8, 16), config).unprotected(config)


class TestWhatAConfigSaysOfLayers:
    def kept(self, model_type, gone=(1, 4), **fields):
        stack = discovery.find(zoo.build(model_type, **fields))
        before = dict(vars(stack.text_config))
        with removal.removed(stack, gone):
            told = stack.text_config.to_dict()
        assert vars(stack.text_config) == before
        return told

    def test_how_many_come_first(self):
        assert self.kept("deepseek_v3", first_k_dense_replace=3)["first_k_dense_replace"] == 2

    def test_which_they_are(self):
        assert self.kept("qwen3_moe", mlp_only_layers=[1, 3, 6])["mlp_only_layers"] == [2, 4]

    def test_a_pattern(self):
        kinds = self.kept("recurrent_gemma", block_types=["recurrent", "attention"])["block_types"]
        assert kinds == ["recurrent", "recurrent", "attention", "attention", "recurrent", "attention"]

    def test_a_scale_by_depth(self):
        assert self.kept("minicpm3", scale_depth=2.0)["scale_depth"] == pytest.approx(2 * (6 / 8) ** 0.5)

    def test_what_a_heterogeneous_config_overrides(self):
        dense, told = self.kept("gemma4_unified_text", gone=()), self.kept("gemma4_unified_text", gone=(1, 4))
        overrides = {int(i): values for i, values in dense["per_layer_config"].items()}
        assert list(overrides) == [5, 7]
        assert {int(i): o for i, o in told["per_layer_config"].items()} == {3: overrides[5], 5: overrides[7]}


def test_every_declared_family_is_tested_or_refused():
    tested = {o.model_type for o in architectures.recorded().of("supported")}
    for family in families.all_families().values():
        assert family.refused or tested & set(family.model_types), family.name
