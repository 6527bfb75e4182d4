"""Width: the units that go, how many, and that a narrowed model is an ordinary one that leaves no trace."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch_pruning
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.pruning.test_methods import DEPTH, SMALL, drain, lab_of, logits
from trsp_core.errors import TrspError
from trsp_core.evaluation import saving
from trsp_core.pruning import engine, methods, validate
from trsp_core.pruning.methods import width
from trsp_core.schema import codec
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import LayersNarrowed, LayersRemoved, Progressed
from trsp_core.schema.run_state import RunState, fold, summary
from trsp_core.surgery import discovery

WORKS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi")
WORKS += ("olmo", "granite", "cohere", "starcoder2")
REFUSED = dict.fromkeys(("gpt2", "gpt_neox", "phi3", "bloom", "falcon", "mpt", "mamba"), "not three ordinary matrices")
REFUSED |= dict.fromkeys(("opt", "mixtral", "qwen3_moe", "gptj"), "MLP is not a module of its own")
REFUSED |= {"qwen2_moe": "not equally wide"}
REFUSED |= dict.fromkeys(("stablelm", "olmo2"), "cannot describe fewer heads")


@pytest.fixture
def own_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(tiny.text(1200), "utf-8")
    return str(file)


def narrowed(model, count=2, **settings):
    lab, config = lab_of("width", model, **settings)
    told, (layers, entries) = drain(width.narrow(lab, config, count))
    return lab, told, layers, entries


def test_every_tiny_family_works_or_is_refused():
    assert set(WORKS) | set(REFUSED) == set(tiny.CONFIGS)


@pytest.mark.parametrize("model_type", WORKS)
def test_a_narrowed_model_is_an_ordinary_one_and_leaves_no_trace(model_type, tmp_path):
    model = tiny.build(model_type)
    model.config.architectures = [type(model).__name__]  # as in a model that was loaded; saving sets it
    before, config, weights = logits(model), model.config.to_dict(), [id(p) for p in model.parameters()]
    lab, told, layers, entries = narrowed(model)
    event = told[-1]
    with lab.narrowed(layers, entries):
        parameters = sum(p.numel() for p in model.parameters())
        after = logits(model)
        saving.save(RunConfig(), lab.stack, tiny.tokenizer(), tmp_path / "model")
    assert event.parameters == parameters <= event.aim
    total, layer = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.model.layers.parameters())
    assert event.aim == total - 2 * layer // tiny.L
    channel = sum(part.size() for part in width.channels(lab, lab.stack.layers[0]))
    assert event.aim - parameters < tiny.L * channel, "one channel fewer would have been too few"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again), after)
    assert not torch.equal(after, before)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert [id(p) for p in model.parameters()] == weights
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_that_cannot_be_narrowed_is_refused_by_name(model_type):
    model = tiny.build(model_type)
    with pytest.raises(TrspError, match=f"{discovery.find(model).family.name}.*{REFUSED[model_type]}") as caught:
        narrowed(model)
    assert caught.value.remedy


@pytest.mark.parametrize("model_type", WORKS)
def test_planted_dead_units_are_the_ones_that_go(model_type):
    """In each layer as many heads and channels as have to go write nothing: without them nothing changes."""
    model = tiny.build(model_type)
    lab, config = lab_of("width", model)
    _, (_, entries) = drain(width.narrow(lab, config, 2))
    heads = model.config.num_key_value_heads
    gone = heads - entries["num_key_value_heads"], 48 - entries["intermediate_size"]
    assert min(gone) > 0
    generator = torch.Generator().manual_seed(7)
    kept = []
    with torch.no_grad():
        for layer in lab.stack.layers:
            halves = width.heads(lab, layer), width.channels(lab, layer)
            for half, units, count in zip(halves, (heads, 48), gone, strict=True):
                back = next(part for part in half if part.side == "in")
                dead = torch.randperm(units, generator=generator)[:count].tolist()
                for unit in dead:
                    back.module.weight[:, unit * back.span : (unit + 1) * back.span] = 0
                alive = [u for u in range(units) if u not in dead]
                kept.append(torch.cat([back.module.weight[:, u * back.span : (u + 1) * back.span] for u in alive], 1))
    before = logits(model)
    lab, _, layers, entries = narrowed(model)
    with lab.narrowed(layers, entries):
        left = [
            next(part for part in half if part.side == "in").module.weight
            for layer in lab.stack.layers
            for half in (width.heads(lab, layer), width.channels(lab, layer))
        ]
        assert all(torch.equal(a, b) for a, b in zip(left, kept, strict=True))
        assert torch.allclose(logits(model), before, atol=1e-3)


def test_scores_are_the_librarys_grouped_taylor_scores():
    model = tiny.build()
    lab, _ = lab_of("width", model)
    mlp = model.model.layers[1].mlp
    parts = width.channels(lab, lab.stack.layers[1])
    assert {part.module for part in parts} == {mlp.gate_proj, mlp.up_proj, mlp.down_proj}
    with lab.learning([part.module.weight for part in parts]):
        lab.add_gradient(lab.blocks[:2], 1.0)
        probe = torch.zeros(1, 2, tiny.D, requires_grad=True)
        graph = torch_pruning.DependencyGraph().build_dependency(
            mlp, probe, forward_fn=lambda module, x: module(x), verbose=False
        )
        group = graph.get_pruning_group(mlp.down_proj, torch_pruning.prune_linear_in_channels, list(range(48)))
        theirs = torch_pruning.importance.GroupTaylorImportance("sum", None)(group)
        ours = sum(part.salience() for part in parts)
    assert torch.allclose(ours.float(), theirs, rtol=1e-4)


def test_a_heads_score_by_hand():
    """A key-value head of two query heads: its rows of k and v, theirs of q, and the columns that read them."""
    model = tiny.build()
    lab, _ = lab_of("width", model)
    attention = model.model.layers[2].self_attn
    parts = width.heads(lab, lab.stack.layers[2])
    with lab.learning([part.module.weight for part in parts]):
        lab.add_gradient(lab.blocks[:2], 1.0)
        ours = sum(part.salience() for part in parts).tolist()
        q, k, v, o = (
            (m.weight * m.weight.grad).abs()
            for m in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        by_hand = [
            (q[16 * g : 16 * g + 16].sum() + k[8 * g : 8 * g + 8].sum() + v[8 * g : 8 * g + 8].sum()).item()
            + o[:, 16 * g : 16 * g + 16].sum().item()
            for g in range(2)
        ]
    assert ours == pytest.approx(by_hand, rel=1e-4)


def test_the_same_again():
    first, second = (narrowed(tiny.build(n_layers=DEPTH)) for _ in range(2))
    assert first[1] == second[1]
    for a, b in zip(first[2], second[2], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_closing_at_any_event_leaves_the_model_bit_identical():
    model = tiny.build(n_layers=DEPTH)
    before, flags = logits(model), [p.requires_grad for p in model.parameters()]
    lab, config = lab_of("width", model)
    total = len(drain(width.narrow(lab, config, 2))[0])
    for stop in range(total + 1):
        generator = width.narrow(lab, config, 2)
        told = list(itertools.islice(generator, stop))
        generator.close()
        assert {type(e) for e in told} <= {Progressed, LayersNarrowed}
        assert torch.equal(logits(model), before)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())


def test_no_layer_is_chosen():
    lab, config = lab_of("width")
    assert drain(width.choose(lab, config, 3)) == ([], [])


def test_a_number_of_heads_that_the_config_refuses_is_not_taken():
    """Llama's config wants the width to be a multiple of the number of heads: 3 of 4 do not go into 32."""
    model = tiny.build()
    lab, _ = lab_of("width", model)
    parts = width.heads(lab, lab.stack.layers[0]), width.channels(lab, lab.stack.layers[0])
    model.config.num_key_value_heads = 4  # as if each query head had its own
    layer, sizes = 10_000.0, tuple(sum(part.size() for part in half) for half in parts)
    gone, entries, _ = width.cuts(lab, layer, 0.3, (4, 480), sizes)
    assert entries["num_attention_heads"] == 2
    assert gone == (2, math.ceil((3000 - 2 * sizes[0]) / sizes[1]))


def test_what_is_too_small_to_reach_is_refused():
    with pytest.raises(TrspError, match="in width"):
        narrowed(tiny.build(), count=5)


@pytest.mark.parametrize("control", ["none", "delete_first"])
def test_a_run_narrows_measures_and_keeps_it(control, tmp_path, own_text):
    steps = {"stage2_steps": 2, "control": "delete_first"} if control == "delete_first" else {"stage2_steps": 0}
    model = tiny.build(n_layers=DEPTH)
    how = {
        **SMALL,
        **steps,
        "method": "width",
        "text": own_text,
        "heldout": own_text,
        "measure_blocks": 2,
        "probe_blocks": 1,
    }
    how |= {"measure_length": 16, "kl_blocks": 1, "speed_repeats": 1, "sample_tokens": 2, "calibration_blocks": 4}
    config = validate.from_values(how)
    before = logits(model)
    told = list(engine.execute(config, tmp_path, (model, tiny.tokenizer())))
    assert torch.equal(logits(model), before)
    (event,) = [e for e in told if isinstance(e, LayersNarrowed)]
    (removal,) = [e for e in told if isinstance(e, LayersRemoved)]
    assert (removal.removed, removal.kept) == ([], list(range(DEPTH)))
    assert removal.parameters == event.parameters <= event.aim < removal.parameters_before
    folded = fold(RunState(), [(n, 0.0, e) for n, e in enumerate(told)])
    assert folded.ceiling is None
    figures = summary(folded)
    assert "ceiling" not in figures["speed"]
    assert figures["narrowed"]["channels"] == event.channels
    assert json.loads(json.dumps(codec.plain(event))) == codec.plain(event)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in again.parameters()) == event.parameters
    assert len(discovery.find(again).layers) == DEPTH
    by = folded.perplexity
    assert (by["pruned"] != by["direct"]) == (control == "delete_first")


def test_settings_that_do_not_go_with_it_are_refused():
    for more, what in (
        ({"stage2_steps": 5}, "no layer"),
        ({"stage2_steps": 0, "protect_first": 1}, "spared"),
        ({"stage2_steps": 0, "no_neighbours": True}, "spared"),
    ):
        with pytest.raises(TrspError, match=what) as caught:
            validate.from_values({"method": "width", **more})
        assert "--" in caught.value.problems[0].remedy if caught.value.problems else "--" in caught.value.remedy
    assert validate.from_values({"method": "width", "stage2_steps": 5, "control": "delete_first"}).stage2_steps == 5
    assert methods.get("width").narrow is not None
