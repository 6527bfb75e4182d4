"""The mathematics of both stages, against closed forms worked out by hand."""

import contextlib
import math
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests import tiny
from trsp_core.errors import TrspError
from trsp_core.evaluation.losses import next_token_loss
from trsp_core.perf import budget, parallel
from trsp_core.perf.optimizer_in_backward import EagerAdamW
from trsp_core.pruning import stage2, validate
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.methods import trsp
from trsp_core.schema import config as configs
from trsp_core.schema import schedules
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import LayerChosen, StageOneStepped, StageTwoStepped
from trsp_core.surgery import discovery, hooks, lora
from trsp_core.surgery.stack import Stack

SMALL = {"block_length": 16, "stage1_steps": 3, "stage2_steps": 4, "batch_blocks": 2, "lambda_1": 0.05}


def lab_of(model=None, **settings):
    model = model or tiny.build()
    config = validate.from_values({**SMALL, **settings})
    return Lab(discovery.find(model), tiny.ids(16, 16), config), config


def drain(generator):
    events = []
    while True:
        try:
            events.append(next(generator))
        except StopIteration as end:
            return events, end.value


class Toy(nn.Module):
    """Two linear residual layers, x + A x, so that gate gradients can be written down."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.A = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

            def forward(self, hidden_states):
                return hidden_states + hidden_states @ self.A.T

        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", ["branch", "output"])
def test_gate_gradients_by_hand(kind):
    """Loss = sum of the output. branch: x -> (I + s2 A2)(I + s1 A1) x. output: x -> s2 (I + A2) s1 (I + A1) x."""
    toy = Toy()
    stack = Stack(toy, toy, "layers", None, None)  # type: ignore[arg-type]
    x, s = torch.randn(1, 4, 3, dtype=torch.float64), torch.tensor([0.7, 0.4], dtype=torch.float64, requires_grad=True)
    with hooks.gated(stack, s, kind, [0, 1]):
        toy(x).sum().backward()
    A1, A2 = (layer.A.detach() for layer in toy.layers)
    one = torch.eye(3, dtype=torch.float64)
    if kind == "branch":
        d1, d2 = (one + 0.4 * A2) @ A1, A2 @ (one + 0.7 * A1)
    else:
        whole = (one + A2) @ (one + A1)
        d1, d2 = 0.4 * whole, 0.7 * whole
    expected = torch.stack([(x @ d.T).sum() for d in (d1, d2)])
    assert torch.allclose(s.grad, expected, rtol=1e-12)


@given(st.floats(-10, 10), st.floats(0, 10))
def test_soft_threshold_is_its_formula_and_minimises_its_objective(s, t):
    got = trsp.soft_threshold(torch.tensor([s], dtype=torch.float64), t).item()
    assert got == pytest.approx(math.copysign(max(abs(s) - t, 0.0), s), abs=1e-12)

    def objective(z):
        return 0.5 * (z - s) ** 2 + t * abs(z)

    assert all(objective(got) <= objective(got + d) + 1e-9 for d in (-0.1, -1e-3, 1e-3, 0.1))


def test_each_penalty_against_a_direct_sum():
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    gaps = [[[y[b, t, d].item() - x[b, t, d].item() for d in range(4)] for t in range(3)] for b in range(2)]
    l2 = [math.sqrt(sum(g * g for g in token)) for row in gaps for token in row]
    l1 = [sum(abs(g) for g in token) for row in gaps for token in row]
    sizes = [math.sqrt(sum(v * v for v in token)) for row in x.tolist() for token in row]
    expected = {
        "l2": sum(l2) / 6,
        "l1": sum(l1) / 6,
        "sum": sum(l2),
        "relative": sum(a / b for a, b in zip(l2, sizes, strict=True)) / 6,
    }
    assert set(expected) == set(configs.KNOBS["penalty"].choices)
    for kind, value in expected.items():
        assert stage2.penalty(x, y, kind).item() == pytest.approx(value, rel=1e-5), kind


def test_the_relative_penalty_does_not_depend_on_the_models_scale_nor_teach_the_input_to_grow():
    x, y = torch.randn(1, 5, 8, requires_grad=True), torch.randn(1, 5, 8)
    small = stage2.penalty(x, y, "relative")
    assert stage2.penalty(100 * x, 100 * y, "relative").item() == pytest.approx(small.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(small, x)
    gap = y - x.detach()
    by_hand = -gap / gap.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True) / 5
    assert torch.allclose(gradient, by_hand, atol=1e-6)


def test_a_penalty_of_a_closed_gap_has_a_finite_gradient():
    x = torch.randn(1, 2, 4)
    y = x.clone().requires_grad_()
    for kind in configs.KNOBS["penalty"].choices:
        (gradient,) = torch.autograd.grad(stage2.penalty(x, y, kind), y)
        assert torch.isfinite(gradient).all(), kind


def test_next_token_loss_is_minus_the_log_probability_of_what_follows():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    got = next_token_loss(logits, ids)
    assert got.shape == (2, 3)
    row = logits[1, 2].double()
    expected = math.log(row.exp().sum().item()) - row[ids[1, 3]].item()
    assert got[1, 2].item() == pytest.approx(expected, rel=1e-5)


class TestStageOne:
    def test_frozen_weights_stay_bit_identical_and_only_s_learns(self):
        lab, config = lab_of()
        before = {k: v.clone() for k, v in lab.model.state_dict().items()}
        events, chosen = drain(trsp.choose(lab, config, 2))
        assert all(torch.equal(v, before[k]) for k, v in lab.model.state_dict().items())
        steps = [e for e in events if isinstance(e, StageOneStepped)]
        assert [e.step for e in steps] == list(range(1, 7))
        assert [e.round for e in steps] == [1, 1, 1, 2, 2, 2]
        assert len(set(chosen)) == 2
        assert len(set(steps[-1].weights)) > 2, "the loss moved no weight, or all alike"

    def test_letting_w_learn_changes_it(self):
        lab, config = lab_of(learn_weights=True, stage1_weight_lr=1e-3)
        before = lab.model.get_input_embeddings().weight.clone()
        drain(trsp.choose(lab, config, 1))
        assert not torch.equal(before, lab.model.get_input_embeddings().weight)

    def test_the_smallest_candidate_is_chosen_with_its_margin_and_skipped_from_then_on(self):
        lab, config = lab_of()
        events, chosen = drain(trsp.choose(lab, config, 3))
        weights, gone = [1.0] * tiny.L, []
        for event in events:
            if isinstance(event, StageOneStepped):
                weights = event.weights
                assert [weights[i] for i in gone] == [0.0] * len(gone)
            if isinstance(event, LayerChosen):
                left = sorted((abs(weights[i]), i) for i in range(tiny.L) if i not in gone)
                assert event.layer == left[0][1]
                assert event.margin == pytest.approx(left[1][0] - left[0][0])
                gone.append(event.layer)
        assert gone == chosen

    def test_the_first_subgradient_step_by_hand(self):
        """Adam's first step is rate * sign(gradient); with a huge lambda_1 that is the sign of s."""
        lab, config = lab_of(lambda_1=100, stage1_lr=0.01, stage1_steps=1)
        events, _ = drain(trsp.choose(lab, config, 1))
        assert events[0].weights == pytest.approx([0.99] * tiny.L, abs=1e-6)
        assert events[0].l1 == pytest.approx(tiny.L)

    def test_the_proximal_step_takes_rate_times_lambda_1_off_each_weight(self):
        plain, config = lab_of(lambda_1=0, stage1_steps=1)
        (without, *_), _ = drain(trsp.choose(plain, config, 1))
        lab, config = lab_of(lambda_1=2.0, stage1_lr=0.02, l1="proximal", stage1_steps=1)
        (with_, *_), _ = drain(trsp.choose(lab, config, 1))
        assert with_.weights == pytest.approx([max(w - 0.04, 0.0) for w in without.weights], abs=1e-6)

    def test_one_shot_chooses_all_after_one_round(self):
        lab, config = lab_of(one_shot=True)
        events, chosen = drain(trsp.choose(lab, config, 3))
        assert [type(e) for e in events] == [StageOneStepped] * 3 + [LayerChosen] * 3
        weights = events[2].weights
        assert chosen == sorted(range(tiny.L), key=lambda i: (abs(weights[i]), i))[:3]

    def test_protected_ends_are_never_chosen_and_never_move(self):
        lab, config = lab_of(protect_first=2, protect_last=1, gate="output")
        events, chosen = drain(trsp.choose(lab, config, 2))
        assert set(chosen) == {2, 3}
        assert events[-2].weights[0] == events[-2].weights[1] == events[-2].weights[4] == 1.0

    def test_no_two_neighbours(self):
        lab, config = lab_of(no_neighbours=True)
        _, chosen = drain(trsp.choose(lab, config, 2))
        assert abs(chosen[0] - chosen[1]) > 1

    def test_planted_redundancy_is_found(self):
        """Layers whose branch is nothing cost nothing to remove: only the l1 term moves their weights."""
        model = tiny.build()
        stack = discovery.find(model)
        with torch.no_grad():
            for i in (1, 3):
                for p in stack.outputs(i):
                    p.zero_()
        lab, config = lab_of(model, lambda_1=1e-3, stage1_steps=8)
        _, chosen = drain(trsp.choose(lab, config, 2))
        assert set(chosen) == {1, 3}

    def test_closing_at_any_event_leaves_no_gate_behind(self):
        lab, config = lab_of()
        ids = tiny.ids()
        with torch.no_grad():
            before = lab.model(input_ids=ids, use_cache=False).logits
        for stop in range(1, 8):
            generator = trsp.choose(lab, config, 2)
            for _ in range(stop):
                next(generator)
            generator.close()
            with torch.no_grad():
                assert torch.equal(lab.model(input_ids=ids, use_cache=False).logits, before)
            assert all(p.requires_grad for p in lab.model.parameters())


@pytest.mark.parametrize("rank", [0, 2])
def test_nothing_is_stepped_on_a_loss_that_is_no_number(rank, monkeypatch):
    monkeypatch.setattr(EagerAdamW, "SMALL", 0)
    lab, config = lab_of(adapter_rank=rank)
    with torch.no_grad():
        lab.model.model.norm.weight[0] = torch.nan
    before = {name: p.detach().clone() for name, p in lab.model.named_parameters()}
    with pytest.raises(TrspError, match="no longer a finite number at step 1"):
        drain(stage2.transfer(lab, config, [1, 3]))
    after = dict(lab.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before if "norm" not in name)


@pytest.mark.parametrize("small", [0, 600, 10**6])
def test_eager_steps_are_those_of_adamw_to_the_bit(monkeypatch, small):
    """Also where a part of the gradient comes from a pass of its own, and rates differ and change; whether all
    parameters are stepped at once, some of them or none."""
    monkeypatch.setattr(EagerAdamW, "SMALL", small)
    models = [tiny.build(), tiny.build()]
    groups = [[list(m.parameters())[:3], list(m.parameters())[3:]] for m in models]
    plain = torch.optim.AdamW([{"params": g} for g in groups[0]], weight_decay=0.0, fused=True)
    eager = EagerAdamW([{"params": g} for g in groups[1]], lr=0.0)
    with eager.stepping():
        for step in range(3):
            for optimizer in (plain, eager):
                for group, rate in zip(optimizer.param_groups, (1e-3, 1e-2), strict=True):
                    group["lr"] = rate / (step + 1)
            eager.pace()
            for model, held in ((models[0], contextlib.nullcontext()), (models[1], eager.held())):
                loss = next_token_loss(model(input_ids=tiny.ids(seed=step), use_cache=False).logits, tiny.ids()).mean()
                own = list(model.model.layers[2].parameters())
                with held:
                    torch.autograd.backward(3 * loss, inputs=own, retain_graph=True)
                loss.backward()
            waiting = sum(p.grad is not None for p in models[1].parameters())
            assert waiting == sum(p.numel() <= small for p in models[1].parameters())
            for optimizer in (plain, eager):
                optimizer.step()
                optimizer.zero_grad()
    assert all(p.grad is None for p in models[1].parameters())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


class TestStageTwo:
    def steps(self, model=None, **settings):
        lab, config = lab_of(model, **settings)
        return [e for e in drain(stage2.transfer(lab, config, [1, 3]))[0]], lab, config

    def test_a_strong_penalty_closes_the_gap(self):
        how = {"stage2_steps": 60, "stage2_lr": 3e-3, "lambda_2": 20.0, "output_rate": 3.0}
        for reach in ("local", "model"):
            events, _, _ = self.steps(penalty_reach=reach, **how)
            assert sum(events[-1].gaps) < 0.5 * sum(events[0].gaps), reach

    def test_without_lambda_2_it_is_plain_training(self):
        """One step equals AdamW's first step on the language-modelling loss alone."""
        events, lab, config = self.steps(lambda_2=0.0, stage2_steps=1, stage2_lr=1e-3, output_rate=1.0)
        twin, _ = lab_of()
        optimizer = torch.optim.AdamW(twin.model.parameters(), lr=1e-3, weight_decay=0.0)
        twin.lm_loss(next(twin.batches(1, config.seed * 1009))).backward()
        optimizer.step()
        for a, b in zip(lab.model.parameters(), twin.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-7)
        assert events[0].lambda_2 == 0

    def test_the_local_gradient_is_that_of_a_detached_input(self, monkeypatch):
        lab, config = lab_of(lambda_2=3.0, penalty="l2", lambda_2_schedule="constant", stage2_steps=1)
        ids = next(lab.batches(1, config.seed * 1009))
        grads = {}
        names = {id(p): n for n, p in lab.model.named_parameters()}

        def catch(self, *args, **kwargs):
            for p in self.param_groups[0]["params"]:
                grads[names[id(p)]] = p.grad.clone()

        monkeypatch.setattr(torch.optim.AdamW, "step", catch)
        drain(stage2.transfer(lab, config, [1, 3]))
        lab.model.zero_grad()
        with lab.tapped([1, 3]) as taps:
            lab.lm_loss(ids).backward()
            entered = {i: x.detach() for i, (x, _) in taps.items()}
        expected = {n: p.grad.clone() for n, p in lab.model.named_parameters()}
        calls = {}
        for i in (1, 3):  # run each chosen layer again, alone, on a detached input
            layer = lab.stack.layers[i]
            hook = layer.register_forward_hook(lambda m, a, k, o, i=i: calls.update({i: (a, k)}), with_kwargs=True)
            with torch.no_grad():
                lab.lm_loss(ids)
            hook.remove()
            _, kwargs = calls[i]
            own = list(layer.parameters())
            out = layer(entered[i], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
            names = [f"model.layers.{i}.{n}" for n, _ in layer.named_parameters()]
            term = 3.0 * (out - entered[i]).norm(dim=-1).mean()
            for name, gradient in zip(names, torch.autograd.grad(term, own), strict=True):
                expected[name] = expected[name] + gradient
        for name, value in expected.items():
            assert torch.allclose(grads[name], value, atol=1e-5), name

    def test_the_penalty_through_the_model_also_moves_layers_below(self):
        """Layer 0 has no gap penalised; its gradient changes with lambda_2 only where the penalty flows through."""
        moved = {}
        for reach in ("local", "model"):
            for strength in (0.0, 50.0):
                _, lab, _ = self.steps(
                    penalty_reach=reach, lambda_2=strength, stage2_steps=1, lambda_2_schedule="constant"
                )
                moved[reach, strength] = torch.cat([p.flatten() for p in lab.stack.layers[0].parameters()])
        assert torch.equal(moved["local", 0.0], moved["local", 50.0])
        assert not torch.equal(moved["model", 0.0], moved["model", 50.0])

    def test_the_reported_penalty_is_the_direct_sum(self):
        events, _, config = self.steps(penalty="l1", stage2_steps=1)
        lab, _ = lab_of()
        with lab.tapped([1, 3]) as taps, torch.no_grad():
            loss = lab.lm_loss(next(lab.batches(1, config.seed * 1009)))
            direct = sum((y - x).abs().sum(-1).mean().item() for x, y in taps.values())
        assert events[0].penalty == pytest.approx(direct, rel=1e-5)
        assert events[0].lm_loss == pytest.approx(loss.item(), rel=1e-6)

    def test_output_projections_of_the_chosen_layers_have_their_own_rate(self):
        before = tiny.build()
        _, lab, _ = self.steps(output_rate=0.0, stage2_steps=1, stage2_lr=1e-2)
        still = {id(p) for i in (1, 3) for p in lab.stack.outputs(i)}
        for old, new in zip(before.parameters(), lab.model.parameters(), strict=True):
            assert torch.equal(old, new) == (id(new) in still)

    def test_schedules(self):
        assert [schedules.ramp(t, 4, "ramp") for t in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
        assert {schedules.ramp(t, 4, "constant") for t in (1, 4)} == {1.0}
        rates = [schedules.rate_factor(t, 100, "cosine") for t in range(1, 101)]
        assert rates[9] == max(rates) == 1.0
        assert rates[-1] == pytest.approx(0.1)
        assert {schedules.rate_factor(t, 100, "constant") for t in (1, 100)} == {1.0}
        events, *_ = self.steps(lambda_2_schedule="ramp", lr_schedule="cosine", lambda_2=8.0)
        assert [e.lambda_2 for e in events] == [2.0, 4.0, 6.0, 8.0]
        assert events[-1].learning_rate == pytest.approx(0.1 * RunConfig().stage2_lr)

    def test_a_loss_that_is_no_number_names_the_step(self):
        lab, config = lab_of(stage2_steps=5)
        generator = stage2.transfer(lab, config, [1, 3])
        next(generator)
        next(generator)
        with torch.no_grad():
            lab.stack.layers[0].mlp.down_proj.weight[0, 0] = math.nan
        with pytest.raises(TrspError, match="step 3 of stage 2") as caught:
            next(generator)
        assert "learning rate" in caught.value.remedy

    def test_every_step_is_told(self):
        events, *_ = self.steps()
        assert [type(e) for e in events] == [StageTwoStepped] * 4
        assert all(len(e.gaps) == 2 for e in events)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_loss_in_parts_is_the_whole_one_with_its_gradient(model_type, rows):
    """Gates, and skipped layers, are those of the model at hand; nothing is left on it or on its views."""
    lab, _ = lab_of(tiny.build(model_type))
    s, ids = torch.linspace(0.4, 1.2, lab.n_layers).requires_grad_(), tiny.ids(rows)
    found = {}
    with lab.learning([]), lab.gated(s, "branch", [0, 1, 3]), lab.skipped([2]):
        for name, loss in (("whole", lab.lm_loss(ids)), ("parts", lab.gate_loss(s, ids))):
            (gradient,) = torch.autograd.grad(3 * loss, s)
            found[name] = (loss.item(), gradient)
    assert found["parts"][0] == pytest.approx(found["whole"][0], rel=1e-6)
    assert torch.allclose(found["parts"][1], found["whole"][1], rtol=1e-4, atol=1e-6)
    assert found["parts"][1][2] == 0
    assert all(p.grad is None for p in lab.model.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_adapter_as_one_step_is_pefts_own(kind):
    """Values and gradients, with biases (qwen2) and without."""
    stack, ids = discovery.find(tiny.build(kind)), tiny.ids()
    with lora.adapted(stack, 3, 0) as learnt:
        with torch.no_grad():
            for parameter in learnt:
                parameter.normal_(std=0.1)
        told = []
        for _ in range(2):
            loss = next_token_loss(stack.model(input_ids=ids, use_cache=False).logits, ids).mean()
            told.append([loss.detach(), *torch.autograd.grad(loss, learnt)])
            for adapter in lora.of(stack).values():
                adapter.__class__ = type(adapter).__bases__[0]
        for own, pefts in zip(*told, strict=True):
            assert (own - pefts).norm() <= 1e-5 * pefts.norm() + 1e-9


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"penalty_reach": "model", "penalty": "relative"},
        {"penalty": "sum"},
        {"distil": 0.5},
        {"distil": 0.5, "distil_from": "states", "recompute": True},
        {"anneal": 0.5},
        {"model_type": "gpt2"},
        {"model_type": "gemma2"},
    ],
    ids=str,
)
def test_adapters_learn_in_lanes_what_they_learn_in_one_pass(monkeypatch, settings):
    """Three blocks a step, each a pass of its own, so that lanes differ in width; of large adapters too none is stepped
    by one lane alone."""
    cores = torch.get_num_threads()
    settings = {"batch_blocks": 3, "adapter_rank": 2, "lambda_2": 2.0} | settings
    kind, found = settings.pop("model_type", "llama"), []
    monkeypatch.setattr(EagerAdamW, "SMALL", 0)
    monkeypatch.setattr(budget, "LANE_TOKENS", 16)
    torch.set_num_threads(2)
    try:
        for lanes in (Lab.lanes, lambda self, rows: [self]):
            monkeypatch.setattr(Lab, "lanes", lanes)
            lab, config = lab_of(tiny.build(kind), **settings)
            lab.teacher = discovery.find(tiny.build(kind, seed=1))
            learnt, events = {}, []
            for event in stage2.transfer(lab, config, [1, 3]):
                events.append(event)
                learnt = {n: p.detach().clone() for n, p in lab.model.named_parameters() if "lora_" in n}
                assert all(p.grad is None for p in lab.model.parameters())
            found.append((events, learnt))
    finally:
        torch.set_num_threads(cores)
    (events, learnt), (plain, wanted) = found
    for own, other in zip(events, plain, strict=True):
        told = [[e.lm_loss, e.penalty, *e.gaps] for e in (own, other)]
        assert told[0] == pytest.approx(told[1], rel=1e-4)
    assert any(value.any() for name, value in wanted.items() if "lora_B" in name)
    for name, value in wanted.items():  # Adam's first steps are a rate long, whatever the gradient's size
        assert (learnt[name] - value).norm() <= 2e-2 * value.norm(), name


@pytest.mark.parametrize("slow", [0, 1])
def test_lanes_end_the_same_whichever_is_first(monkeypatch, slow):
    """Gradients are added up in order, so a run can be repeated to the bit."""
    cores, run = torch.get_num_threads(), parallel.run

    def late(task):
        time.sleep(0.05)
        return task()

    def one_late(tasks, device):
        return run([partial(late, t) if i == slow else t for i, t in enumerate(tasks)], device)

    torch.set_num_threads(2)
    try:
        ends = []
        for how in (run, one_late):
            monkeypatch.setattr(parallel, "run", how)
            lab, config = lab_of(adapter_rank=2, lambda_2=2.0)
            drain(stage2.transfer(lab, config, [1, 3]))
            ends.append([p.detach() for p in lab.model.parameters()])
        assert all(map(torch.equal, *ends))
    finally:
        torch.set_num_threads(cores)
