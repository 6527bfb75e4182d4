"""Every transfer: the contract that all share, planted redundancy, and closed forms against a direct solve."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from tests import tiny, zoo
from tests.pruning.test_methods import drain
from trsp_core.data import blocks
from trsp_core.errors import TrspError
from trsp_core.evaluation import perplexity
from trsp_core.evaluation.losses import next_token_loss
from trsp_core.models import loading
from trsp_core.pruning import engine, transfers, validate
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.transfers import kept_weights, magnitude, refit, rotation
from trsp_core.schema import events, schedules
from trsp_core.schema.config import PACKED, TRANSFERS
from trsp_core.surgery import discovery, hooks, quantization, removal, training

DEPTH = 6
CHOSEN = [1, 2, 4]
REPAIRS = [name for name in transfers.names() if transfers.get(name).repair]
CLOSED_FORMS = ["refit", "linear_map"]
LEAST = 1e-6  # the smallest ridge


def lab_of(model=None, token_blocks=None, **settings):
    config = validate.from_values(
        {"method": "manual", "layers": "1,2,4", "block_length": 16, "stage2_steps": 0, **settings}
    )
    stack = discovery.find(model or tiny.build(n_layers=DEPTH))
    lab = Lab(stack, tiny.ids(24, 16) if token_blocks is None else token_blocks, config)
    lab.layer_weights = [0.9 + 0.05 * i for i in range(lab.n_layers)]
    return lab


def repaired(lab, name, chosen):
    return drain(transfers.get(name).repair(lab, lab.config, chosen))


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tiny.ids() if ids is None else ids, use_cache=False).logits


def test_the_config_names_every_file():
    assert transfers.names() == TRANSFERS
    for transfer in transfers.all_transfers().values():
        assert transfer.title
        assert transfer.summary.endswith(".")
        assert transfer.equation
        assert transfer.name in TRANSFERS
    with pytest.raises(TrspError, match="There is no transfer"):
        transfers.get("hope")


@pytest.mark.parametrize("name", REPAIRS)
def test_where_no_layer_goes_nothing_changes(name):
    assert repaired(lab_of(), name, [])[1] == {}


@pytest.mark.parametrize("name", REPAIRS)
@pytest.mark.parametrize("chosen", [CHOSEN, [0], [5], [0, 5], [1, 2, 3, 4]])
def test_it_leaves_the_model_as_it_was_and_changes_layers_that_stay(name, chosen):
    lab = lab_of()
    before = logits(lab.model)
    _, edits = repaired(lab, name, chosen)
    assert torch.equal(logits(lab.model), before)
    gone = {id(p) for i in chosen for p in lab.stack.layers[i].parameters()}
    assert not gone & {id(p) for p in edits}
    assert all(value.shape == p.shape and value.isfinite().all() for p, value in edits.items())


@pytest.mark.parametrize("name", REPAIRS)
def test_closed_at_any_event_it_leaves_the_model_as_it_was(name):
    lab = lab_of()
    before, stop = logits(lab.model), 0
    while True:
        stop += 1
        story = transfers.get(name).repair(lab, lab.config, CHOSEN)
        told = [event for event, _ in zip(story, range(stop), strict=False)]
        story.close()
        assert torch.equal(logits(lab.model), before)
        if len(told) < stop:
            break
    assert stop > 2


def planted(scale):
    """A tiny model whose layer 3 can take over what layer 4 does: layer 4's attention writes nothing, and its MLP reads
    what layer 3's does and differs from it by a linear map of its output. Layer 3 itself writes `scale` times as much
    as layer 4, so little that layer 4's norm hardly sees it."""
    torch.manual_seed(3)
    model = tiny.build(n_layers=DEPTH)
    third, fourth = model.model.layers[3], model.model.layers[4]
    with torch.no_grad():
        fourth.self_attn.o_proj.weight.zero_()
        fourth.post_attention_layernorm.weight.copy_(third.post_attention_layernorm.weight)
        for name in ("gate_proj", "up_proj"):
            getattr(fourth.mlp, name).weight.copy_(getattr(third.mlp, name).weight)
        width = third.mlp.down_proj.weight.shape[0]
        base = third.mlp.down_proj.weight.clone()
        fourth.mlp.down_proj.weight.copy_(torch.linalg.qr(torch.randn(width, width)).Q @ base)
        third.mlp.down_proj.weight.copy_(scale * base)
    return model


@pytest.mark.parametrize(("name", "scale"), [("refit", 0.0), ("linear_map", 1e-4), ("refit", 1e-4)])
def test_what_a_linear_map_of_a_neighbour_can_do_is_recovered(name, scale):
    model = planted(scale)
    lab = lab_of(model, torch.randint(0, tiny.V, (60, 16)), ridge=LEAST)
    dense = logits(model)
    with removal.removed(lab.stack, [4]):
        off = (logits(model) - dense).norm()
    told, edits = repaired(lab, name, [4])
    with training.rewritten(edits), removal.removed(lab.stack, [4]):
        left = (logits(model) - dense).norm()
    assert left < 2e-3 * off
    first = next(e for e in told if isinstance(e, events.LayerRefitted))
    assert first.layer == 3
    assert first.after < 2e-3 * first.before


def test_the_solve_is_the_minimum_of_its_equation():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 7, 5) for _ in range(3)]
    errors = [torch.randn(2, 7, 4) for _ in range(3)]
    weights = [torch.rand(2, 7, 1) + 0.1 for _ in range(3)]
    h, e, w = (torch.cat([x.flatten(0, 1) for x in parts]).double() for parts in (inputs, errors, weights))
    for ridge in (1e-6, 0.3, 10.0):
        pull = (ridge * (h * w).square().sum(0).mean()).sqrt() * torch.eye(5, dtype=torch.float64)
        rows = torch.cat([h * w, pull])
        expected = torch.linalg.lstsq(rows, torch.cat([e * w, torch.zeros(5, 4)])).solution
        assert torch.allclose(refit.solved(inputs, errors, weights, ridge).double(), expected, atol=1e-5)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_each_fitted_layer_comes_nearer_to_the_dense_state(name):
    told, edits = repaired(lab_of(ridge=0.01), name, CHOSEN)
    fits = [e for e in told if isinstance(e, events.LayerRefitted)]
    assert [e.layer for e in fits] == ([0, 3, 5] if name == "refit" else [0, 3])
    assert all(e.after < e.before for e in fits)
    assert len(edits) == (2 if name == "refit" else 1) * len(
        fits
    )  # attention's and the MLP's projection, or the latter


def test_fitting_attention_too_comes_nearer_than_the_mlp_alone():
    distances = {}
    for part in ("all", "mlp"):
        told, edits = repaired(lab_of(ridge=0.01, refit=part), "refit", CHOSEN)
        distances[part] = [e.after for e in told if isinstance(e, events.LayerRefitted)]
        assert len(edits) == len(distances[part]) * (2 if part == "all" else 1)
    assert all(both < alone for both, alone in zip(distances["all"], distances["mlp"], strict=True))


@pytest.mark.parametrize("chosen", [CHOSEN, [0], [0, 3], [0, 5], [0, 1, 2], [5], [1, 2, 3, 4]])
def test_a_layer_is_fitted_on_what_those_below_it_really_give(chosen):
    """The events' distances are those of the model that is left: measured on it afterwards, at the last layer."""
    lab = lab_of(ridge=0.1)
    targets = [lab.states(ids)[DEPTH] for ids in lab.pool()]
    told, edits = repaired(lab, "refit", chosen)
    fits = [e for e in told if isinstance(e, events.LayerRefitted)]

    def far():
        with removal.removed(lab.stack, chosen):
            states = [lab.states(ids)[-1] for ids in lab.pool()]
        pairs = zip(targets, states, strict=True)
        return torch.cat([((t - x).norm(dim=-1) / t.norm(dim=-1)).flatten() for t, x in pairs]).mean().item()

    before = far()
    with lab.rewritten(edits):
        after = far()
    assert after == pytest.approx(fits[-1].after, rel=1e-4)
    assert after < 0.95 * before


def whole_run(folder, **settings):
    """The events of a run on the tiny model, and its model."""
    text = folder / "text.txt"
    text.write_text(tiny.text(800), "utf-8")
    values = {**tiny.SETTINGS, "model": "tiny", "text": str(text), "heldout": str(text), "calibration_blocks": 96,
              "save_model": False, "importance_blocks": 0, "transfer": "refit", "stage2_steps": 0,
              "speed_repeats": 0, "probe_blocks": 1}  # fmt: skip
    model = tiny.build(n_layers=DEPTH)
    config = validate.from_values({**values, **settings})
    return list(engine.execute(config, None, (model, tiny.tokenizer()))), model, config


@pytest.mark.parametrize("name", ["refit", "rebuild"])
def test_a_repair_tells_its_layers_and_is_probed_behind_some_of_them(name, tmp_path):
    told, model, config = whole_run(tmp_path, transfer=name, method="manual", layers="1,4")
    (plan,) = [e for e in told if isinstance(e, events.RepairPlanned)]
    fits = [e.layer for e in told if isinstance(e, events.LayerRefitted)]
    assert plan.layers == fits == ([0, 2, 3, 5] if name == "refit" else [0, 3])
    due = schedules.repair_probes(config, len(fits))
    probes = [e for e in told if isinstance(e, events.RepairProbed)]
    assert [(p.layers, p.domain) for p in probes] == [(n, d) for n in due for d in events.DOMAINS]
    at = [n for n, e in enumerate(told) if isinstance(e, events.RepairProbed) and e.domain == "calibration"]
    assert all(isinstance(told[n - 1], events.LayerRefitted) for n in at)
    assert torch.equal(logits(model), logits(tiny.build(n_layers=DEPTH)))
    assert len(at) == (3 if name == "refit" else 1)


def test_a_probe_of_a_repair_is_what_stopping_there_gives(tmp_path):
    """A probe is of the model with the first layers as the repair left them, and the others as they came: held against
    a repair that is stopped by hand behind that layer."""
    told, model, config = whole_run(tmp_path, method="manual", layers="1,4", save_model=False)
    probe = next(e for e in told if isinstance(e, events.RepairProbed) and e.layers == 2)
    from trsp_core.data import blocks

    texts = blocks.prepare(config, tiny.tokenizer())
    lab = Lab(discovery.find(model), texts.calibration, config)
    for event in transfers.get("refit").repair(lab, config, [1, 4]):
        if isinstance(event, events.LayerRefitted) and event.layer == 2:
            break
    with training.rewritten(lab.edits), removal.removed(lab.stack, [1, 4]):
        sample = texts.measure[probe.domain][: config.probe_blocks]
        losses = [loss for few in perplexity.block_losses(model, sample) for loss in few]
    assert losses == pytest.approx(probe.losses, rel=1e-5)


def test_probes_of_a_repair_take_a_tenth_of_three_passes_at_most():
    quick = validate.from_values({"transfer": "refit"}, "quick")
    assert schedules.repair_probes(quick, 22) == [4, 9, 13, 18]
    for settings in ({"calibration_blocks": 64}, {"probe_blocks": 8}, {"calibration_blocks": 4}, {}):
        config = dataclasses.replace(quick, **settings)
        for layers in (0, 1, 2, 5, 22, 60):
            due = schedules.repair_probes(config, layers)
            read = len(due) * 2 * config.probe_blocks * config.measure_length
            assert read <= 0.1 * 3 * config.calibration_blocks * config.block_length
            assert sorted({*due}) == due
            assert all(0 < n < layers for n in due)
    assert schedules.repair_probes(dataclasses.replace(quick, probe_blocks=0), 22) == []


def test_magnitude_is_the_ratio_of_mean_sizes():
    lab = lab_of()
    before, after = (torch.cat([lab.states(ids)[i].flatten(0, 1) for ids in lab.pool()]) for i in (3, 5))
    alpha = (after.abs().mean(0) / before.abs().mean(0)).mean()
    _, edits = repaired(lab, "magnitude", [3, 4])
    ids, model = tiny.ids(), lab.model
    state, head_of = lab.entering(3, ids), logits(model)
    with lab.rewritten(edits):
        assert torch.allclose(lab.entering(3, ids), alpha * state, rtol=1e-2, atol=1e-3 * float(state.abs().max()))
        embedding = model.get_input_embeddings().weight
    assert torch.allclose(edits[embedding], alpha * embedding, rtol=1e-4)
    assert torch.equal(logits(model), head_of)


def family_of(model_type, **settings):
    """A lab of a zoo model of this family."""
    return lab_of(zoo.build(model_type), torch.randint(0, 30, (16, 16)), **settings)


def drawn_turn(width, scale=1.3):
    generator = torch.Generator().manual_seed(5)
    draw = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return rotation.Turn(scale, torch.linalg.qr(draw).Q)


ROTATED = [
    "llama",
    "qwen2",
    "qwen3",
    "phi3",
    "granite",
    "mamba2",
]  # biases, a query's own norm, fused maps, multipliers


@pytest.mark.parametrize("model_type", ROTATED)
@pytest.mark.parametrize("chosen", [[1, 4, 5], [0, 7]])
def test_a_turn_below_a_cut_is_that_of_the_state_there(model_type, chosen):
    """However many cuts there are: the model with the folded weights computes what the old weights compute with each
    state turned by a map of its own where layers are gone."""
    lab = family_of(model_type)
    turns = {run: drawn_turn(zoo.D, 1 + 0.1 * n) for n, run in enumerate(magnitude.runs(chosen), 1)}
    ids = torch.randint(3, 30, (2, 8))

    def by(turn):
        return lambda module, args, output: hooks.with_hidden(
            output, rotation.product(hooks.hidden_of(output), turn.matrix)
        )

    with lab.skipped(chosen):
        handles = [lab.stack.layers[run[1]].register_forward_hook(by(turn)) for run, turn in turns.items()]
        expected, plain = logits(lab.model, ids), None
        for handle in handles:
            handle.remove()
        plain = logits(lab.model, ids)
        with lab.rewritten(rotation.turned(lab, chosen, turns)):
            folded = logits(lab.model, ids)
    assert (folded - expected).norm() < 1e-2 * (plain - expected).norm()


def test_the_turn_is_the_nearest_one():
    """The conditions of the minimum: Q' C is symmetric without negative eigenvalues, and the error is orthogonal to
    a X Q."""
    torch.manual_seed(0)
    x, y = (torch.randn(40, 6, dtype=torch.float64) for _ in range(2))
    turn = rotation.nearest(x.T @ y, x.square().sum().item())
    assert torch.allclose(turn.rotation.T @ turn.rotation, torch.eye(6, dtype=torch.float64))
    product = turn.rotation.T @ (x.T @ y)
    assert torch.allclose(product, product.T)
    assert torch.linalg.eigvalsh(product).min() >= -1e-9
    moved = x @ turn.matrix
    assert abs((moved * (y - moved)).sum()) < 1e-9


def test_a_run_that_turns_the_states_is_undone():
    """Where the deleted layers do nothing, and where they do what a turn does."""
    model = tiny.build(n_layers=DEPTH)
    with torch.no_grad():
        for parameter in discovery.find(model).outputs(3):
            parameter.zero_()
    lab, dense = lab_of(model), logits(model)
    _, edits = repaired(lab, "rotation", [3])
    with training.rewritten(edits), removal.removed(lab.stack, [3]):
        assert torch.allclose(logits(model), dense, atol=1e-3 * float(dense.abs().max()))
    turn, x = drawn_turn(6), torch.randn(40, 6, dtype=torch.float64)
    again = rotation.nearest(x.T @ (x @ turn.matrix), x.square().sum().item())
    assert torch.allclose(again.matrix, turn.matrix)


@pytest.mark.parametrize("model_type", ["gptj", "phi", "falcon"])
def test_kept_weights_are_those_of_stage_1_where_attention_and_mlp_read_the_same(model_type):
    lab, chosen = family_of(model_type), [1, 4]
    ids, s = torch.randint(3, 30, (2, 8)), torch.tensor(lab.layer_weights)
    kept_layers = [i for i in range(lab.n_layers) if i not in chosen]
    _, edits = repaired(lab, "kept_weights", chosen)
    with lab.skipped(chosen):
        plain = logits(lab.model, ids)
        with lab.gated(s, "branch", kept_layers):
            weighed = logits(lab.model, ids)
        with lab.rewritten(edits):
            folded = logits(lab.model, ids)
    assert (folded - weighed).norm() < 1e-3 * (plain - weighed).norm()


def test_elsewhere_each_half_of_a_layer_writes_s_times_as_much():
    """The MLP then reads what attention has written, s times as large."""
    lab, ids, s = family_of("llama"), torch.randint(3, 30, (2, 8)), 0.8
    layer, entering, down = lab.stack.layers[2], lab.entering(2, ids), lab.stack.writers(2)[-1].weight
    with lab.rewritten({down: torch.zeros_like(down)}):
        attention = lab.leaving(2, ids, entering) - entering
    with torch.no_grad():
        between = entering + s * attention
        expected = between + s * layer.mlp(layer.post_attention_layernorm(between))
    with lab.rewritten(kept_weights.scaled(lab, 2, s)):
        assert torch.allclose(lab.leaving(2, ids, entering), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRANSFERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_whole_run_ends_and_keeps_what_it_measured(name, steps, tmp_path, unproved):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(800), "utf-8")
    values = {"model": "tiny", "block_length": 16, "measure_length": 24, "measure_blocks": 2, "calibration_blocks": 8,
              "probe_blocks": 1, "importance_blocks": 0, "kl_blocks": 1, "stage1_steps": 1, "speed_repeats": 0,
              "sample_tokens": 3, "threads": 1, "ratio": 0.4}  # fmt: skip
    config = validate.from_values(
        {**values, "text": str(text), "heldout": str(text), "transfer": name, "stage2_steps": steps}
    )
    model = tiny.build(n_layers=DEPTH)
    before = logits(model)
    told = list(engine.execute(config, tmp_path, (model, tiny.tokenizer())))
    assert isinstance(told[-1], events.RunFinished)
    assert torch.equal(logits(model), before)
    states = [e.state for e in told if isinstance(e, events.PerplexityMeasured) and e.domain == "calibration"]
    repairs = name in REPAIRS
    assert ("repaired" in states) == (repairs and steps > 0)
    assert ("trained" in states) == (name == "penalty" and steps > 0)
    assert sorted({*states} & {"dense", "direct", "pruned"}) == ["dense", "direct", "pruned"]
    figures = {
        e.state: e.losses for e in told if isinstance(e, events.PerplexityMeasured) and e.domain == "calibration"
    }
    assert (figures["direct"] == figures["pruned"]) == (not repairs and not steps)
    phases = [e.name for e in told if isinstance(e, events.PhaseStarted)]
    assert ("repair" in phases) == repairs
    from transformers import AutoModelForCausalLM

    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    removed = next(e for e in told if isinstance(e, events.LayersRemoved))
    assert perplexity.parameter_bytes(kept)[0] == removed.parameters
    measured_blocks = blocks.prepare(config, tiny.tokenizer()).measure["calibration"]
    losses = next_token_loss(logits(kept, measured_blocks), measured_blocks).mean(-1).tolist()
    assert losses == pytest.approx(figures["pruned"], abs=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj", "bloom", "opt", "mamba", "qwen3", "phi"])
def test_families_that_add_what_the_mlp_writes_are_refitted(model_type):
    lab = Lab(discovery.find(zoo.build(model_type)), torch.randint(0, 30, (16, 16)), lab_of().config)
    told, edits = repaired(lab, "refit", [1, 4])
    assert edits
    assert all(e.after < e.before for e in told if isinstance(e, events.LayerRefitted))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_families_that_do_not_are_refused_with_the_reason(model_type, name):
    lab = Lab(discovery.find(zoo.build(model_type)), torch.randint(0, 30, (16, 16)), lab_of().config)
    before = logits(lab.model)
    with pytest.raises(TrspError, match="does not end in one linear map") as refusal:
        repaired(lab, name, [1, 4])
    assert "--transfer" in refusal.value.remedy
    assert torch.equal(logits(lab.model), before)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "mamba"])
def test_every_family_can_be_rebuilt_beside_its_cuts(model_type):
    lab = Lab(discovery.find(zoo.build(model_type)), torch.randint(0, 30, (64, 16)), lab_of().config)
    told, edits = repaired(lab, "rebuild", [0, 3, 4])
    fits = [e for e in told if isinstance(e, events.LayerRefitted)]
    assert [e.layer for e in fits] == [1, 2]
    assert all(e.after < e.before for e in fits)
    own = {id(p) for i in (1, 2) for p in lab.stack.layers[i].parameters()}
    assert {id(p) for p in edits} == own


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "olmo2", "gemma2"])
@pytest.mark.parametrize("chosen", [[1, 4], [0, 5]])
def test_a_scale_that_is_not_handed_on_is_refused(model_type, chosen):
    lab = Lab(discovery.find(zoo.build(model_type)), torch.randint(0, 30, (16, 16)), lab_of().config)
    with pytest.raises(TrspError, match="not handed on"):
        repaired(lab, "magnitude", chosen)


@pytest.mark.parametrize("model_type", ["llama", "gemma", "qwen3"])
def test_a_scaled_embedding_leaves_the_head_its_own(model_type):
    """With a head that is the embedding; Gemma's norms multiply by 1 + w."""
    model = zoo.build(model_type)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    lab = Lab(discovery.find(model), torch.randint(0, 30, (16, 16)), lab_of().config)
    ids, last = torch.randint(0, 30, (2, 8)), lab.n_layers - 1
    before = logits(model, ids)
    edits = magnitude.scaled(lab, [last], {(last, last): 1.7})  # all but the last layer: its own part is a little less
    with lab.rewritten(edits), lab.skipped([last]):
        scaled = logits(model, ids)
    with lab.skipped([last]):
        assert torch.allclose(logits(model, ids), scaled, rtol=1e-2, atol=2e-2 * float(before.abs().max()))


@pytest.mark.parametrize(("model_type", "name"), [("gemma2", "refit"), ("mixtral", "linear_map"), ("opt", "magnitude")])
def test_a_model_that_cannot_be_repaired_is_refused_before_any_work(model_type, name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(400), "utf-8")
    values = {**tiny.SETTINGS, "text": str(text), "heldout": str(text), "transfer": name, "model": "tiny"}
    story = engine.execute(validate.from_values(values), None, (zoo.build(model_type), tiny.tokenizer()))
    phases = []
    with pytest.raises(TrspError, match=r"--transfer|closed form|handed on"):
        for event in story:
            phases += [event.name] if isinstance(event, events.PhaseStarted) else []
    assert set(phases) <= {"load", "text"}


def test_equations_that_are_singular_to_rounding_are_refused_with_the_way_out():
    rows = [torch.full((1, 4, 3), float("nan"))]
    with pytest.raises(ArithmeticError, match="ridge of"):
        refit.solved(rows, rows, [torch.ones(1, 4, 1)], LEAST)

    def solve(module, inputs, errors, weights):
        raise ArithmeticError("singular")

    with pytest.raises(TrspError) as refusal:
        lab = lab_of()
        drain(refit.fitted_in_order(lab, [2], [1], lambda layer: [refit.output_projection(lab, layer)], solve))
    assert "--ridge" in refusal.value.remedy


@pytest.mark.parametrize(
    ("name", "model_type", "reason"),
    [
        ("rotation", "smollm3", "is its head as well"),
        ("rotation", "gpt_neox", "more than an RMS norm"),
        ("rotation", "olmo2", "through a norm"),
        ("rotation", "mixtral", "by experts"),
        ("kept_weights", "gemma2", "adds 1"),
        ("kept_weights", "mixtral", "experts write beside"),
    ],
)
def test_a_model_that_it_does_not_fit_is_refused_with_the_reason(name, model_type, reason):
    lab = family_of(model_type)
    before = logits(lab.model)
    with pytest.raises(TrspError, match=reason) as refusal:
        transfers.get(name).require(lab)
    assert "--transfer" in refusal.value.remedy
    assert torch.equal(logits(lab.model), before)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"transfer": "kept_weights"}, "the method manual learns none"),
        ({"transfer": "kept_weights", "method": "sleb", "layers": ""}, "the method sleb learns none"),
        ({"transfer": "kept_weights", "method": "trsp", "layers": "", "gate": "output"}, "on whole outputs"),
        ({"method": "laco", "layers": "", "control": "delete_first"}, "changes the weights that stay"),
        ({"method": "width", "layers": ""}, "removes no layer"),
        ({"precision": "nf4", "adapter_rank": 4, "transfer": "rebuild"}, "packed as nf4"),
        ({"precision": "int8", "adapter_rank": 4, "transfer": "rotation"}, "packed as int8"),
        ({"cycles": 2, "method": "trsp", "layers": "", "stage2_steps": 4}, "Cycles"),
    ],
)
def test_what_cannot_go_together_is_refused(settings, word):
    config = dataclasses.replace(lab_of().config, **{"transfer": "refit", **settings})
    assert any(word in problem.message for problem in validate.check(config))


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_packed_model_is_repaired_in_maps_that_are_unpacked(precision, name, tmp_path):
    model, _ = loading.load(str(tiny.save(tmp_path, n_layers=DEPTH)), precision, "cpu")
    lab, transfer = lab_of(model, ridge=0.01), transfers.get(name)
    maps = [lab.stack.writers(i)[-1] for i in range(DEPTH)]
    with transfers.opened(lab, transfer, []):
        transfer.require(lab)
    before, size = logits(model), perplexity.parameter_bytes(model)
    assert [lab.stack.writers(i)[-1] for i in range(DEPTH)] == maps
    with transfers.opened(lab, transfer, CHOSEN):
        opened_maps = [i for i in range(DEPTH) if lab.stack.writers(i)[-1] is not maps[i]]
        told, edits = repaired(lab, name, CHOSEN)
        with lab.rewritten(edits), removal.removed(lab.stack, CHOSEN):
            after = logits(model)
            plain = quantization.spelled_out(lab.stack, torch.float32)
        assert perplexity.parameter_bytes(model)[0] == size[0]
    fits = [e for e in told if isinstance(e, events.LayerRefitted)]
    assert [e.layer for e in fits] == opened_maps == ([0, 3, 5] if name == "refit" else [0, 3])
    assert all(e.after < e.before for e in fits)
    near = 1e-4 if precision == "nf4" else 0.2  # int8 rounds inputs, too
    assert (logits(plain) - after).norm() < near * after.norm()
    assert torch.equal(logits(model), before)
    assert [lab.stack.writers(i)[-1] for i in range(DEPTH)] == maps


def test_biases_are_kept():
    lab = Lab(discovery.find(zoo.build("opt")), torch.randint(0, 30, (16, 16)), lab_of().config)
    module = refit.output_projection(lab, 0)
    assert isinstance(module, nn.Linear)
    assert module.bias is not None
    _, edits = repaired(lab, "refit", [1])
    assert module.weight in edits
    assert module.bias not in edits
