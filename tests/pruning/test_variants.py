"""What can be varied about stage 2: a gate that fades the chosen layers out, cycles of both stages, hidden states that
are distilled, LoRA adapters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from tests import tiny
from tests.pruning.test_controls import TINY, run
from trsp_core.errors import TrspError
from trsp_core.evaluation import losses as losses_module
from trsp_core.pruning import engine, lab, stage2, validate
from trsp_core.schema import config as configs
from trsp_core.schema import events, schedules
from trsp_core.surgery import discovery, hooks, lora, removal

LORA = {"adapter_rank": 2, "adapter_lr": 1e-2}


def losses(folded, state="pruned", domain="calibration"):
    return next(m.losses for m in folded.measured if (m.state, m.domain) == (state, domain))


class TestAnneal:
    def test_the_gate_closes_in_a_straight_line_and_stays_shut(self):
        assert [schedules.opening(n, 4.0) for n in range(1, 7)] == [0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
        assert schedules.opening(3, 0.0) == 1.0

    def test_lambda_2_ends_where_the_gate_shuts(self):
        """Of 30 steps the gate is open in 7, for 7 < 7.5; a straight line to 10 has come to 70 / 30 by then."""
        two_stage = validate.from_values({}, "two-stage")
        assert [schedules.lambda_2(two_stage, n) for n in (1, 7, 8, 30)] == pytest.approx([1 / 3, 7 / 3, 0.0, 0.0])
        assert schedules.acting(two_stage) == (7, pytest.approx(7 / 3))
        assert schedules.lambda_2_in_words(two_stage).startswith("λ₂ acts in 7 of 30 steps of stage 2, until the gate ")
        assert schedules.lambda_2_in_words(two_stage).endswith(" is shut, and rises to 2.33 of 10.")
        level = dataclasses.replace(two_stage, lambda_2_schedule="constant")
        assert [schedules.lambda_2(level, n) for n in (1, 7, 8)] == [10.0, 10.0, 0.0]
        ungated = dataclasses.replace(two_stage, anneal=0.0)
        assert schedules.lambda_2(ungated, 30) == 10.0
        assert schedules.lambda_2_in_words(ungated) == "λ₂ acts in all 30 steps of stage 2."

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"stage2_steps": 0}, "no steps"),
            ({"lambda_2": 0.0}, "plain training"),
            ({"control": "delete_first"}, "deleted before stage 2"),
            ({"anneal": 0.01}, "from the first step on"),
            ({"cycles": 3}, "in each cycle"),
        ],
    )
    def test_the_form_says_where_it_does_nothing(self, settings, said):
        assert said in schedules.lambda_2_in_words(validate.from_values(settings, "two-stage"))

    @given(
        steps=some.integers(1, 60),
        cycles=some.integers(1, 6),
        anneal=some.floats(0, 1),
        control=some.sampled_from(["none", "delete_first"]),
        schedule=some.sampled_from(["ramp", "constant"]),
    )
    def test_the_steps_it_acts_in_are_counted_one_by_one(self, steps, cycles, anneal, control, schedule):
        how = {"stage2_steps": steps, "cycles": cycles, "anneal": anneal, "control": control}
        config = configs.RunConfig(**how, lambda_2_schedule=schedule)
        values = [schedules.lambda_2(config, n) for n in range(1, steps + 1)]
        assert schedules.acting(config) == (sum(v > 0 for v in values), max(values))

    @pytest.mark.parametrize("how", [{}, {"cycles": 2, "ratio": 0.4}, {"control": "delete_first"}, {"anneal": 0.0}])
    def test_a_run_tells_the_lambda_2_that_acted(self, text, how):
        """From the first step that it is 0 in, no gap is left to press on."""
        folded, _, config = run(text, **{"anneal": 0.5, "stage2_steps": 8, "importance_blocks": 0} | how)
        assert [s.lambda_2 for s in folded.gap_steps] == [schedules.lambda_2(config, n) for n in range(1, 9)]
        for step in folded.gap_steps:
            assert (step.lambda_2 == 0) == (not any(step.gaps)), step.step

    def test_a_gate_that_is_shut_at_once_is_deletion_first(self, text):
        """The chosen layers do nothing and learn nothing: the same steps as without them."""
        given = {"method": "manual", "layers": "1,3"}
        annealed, _, _ = run(text, anneal=0.01, **given)
        control, _, _ = run(text, control="delete_first", **given)
        assert losses(annealed) == pytest.approx(losses(control), rel=1e-5)
        assert annealed.gap_steps[-1].gaps == [0.0, 0.0]

    def test_the_loss_at_a_half_open_gate_by_hand(self, text):
        """The second of four steps, at a rate of nearly nothing: the model with both branches at one half."""
        folded, _, config = run(text, method="manual", layers="1,3", anneal=1.0, stage2_steps=4, stage2_lr=1e-8)
        model = tiny.build()
        bench = lab.Lab(discovery.find(model), _calibration(config), config)
        ids = list(bench.batches(2, 0))[1]
        gate = torch.tensor([1.0, 0.5, 1.0, 0.5, 1.0])
        with torch.no_grad(), bench.gated(gate, "branch", [1, 3]):
            assert folded.gap_steps[1].lm_loss == pytest.approx(bench.lm_loss(ids).item(), rel=1e-4)


class TestCycles:
    def test_they_share_out_layers_and_steps(self, text, tiny_model):
        folded, told, config = run(text, cycles=2, ratio=0.6, stage2_steps=5, importance_blocks=0)
        phases = [e.name for e in told if isinstance(e, events.PhaseStarted)]
        assert phases == ["load", "text", "dense", *["choose", "transfer"] * 2, "trained", "pruned", "save"][:-1]
        assert [name for name in tiny.planned(config, tiny_model) if name != "save"] == phases
        assert len(folded.chosen) == len(set(folded.chosen)) == 3
        assert [s.step for s in folded.gap_steps] == [1, 2, 3, 4, 5]
        assert [len(s.gaps) for s in folded.gap_steps] == [1, 1, 3, 3, 3]
        assert [r.round for r in folded.rounds] == [1, 2, 3]
        assert set(folded.perplexity) == {"dense", "trained", "pruned"}
        assert folded.removed.removed == sorted(folded.chosen)

    def test_a_later_cycle_sees_the_earlier_layers_skipped(self, text):
        folded, _, config = run(text, cycles=2, stage2_steps=2, stage2_lr=1e-8, stage1_lr=1e-6)
        first = folded.chosen[0]
        bench = lab.Lab(discovery.find(tiny.build()), _calibration(config), config)
        ids = next(bench.batches(1, 2))  # the second round's first batch
        step = next(s for s in folded.weight_steps if s.round == 2)
        assert step.weights[first] == 0.0
        assert step.lm_loss == pytest.approx(bench.loss_without([first], ids), rel=1e-4)

    def test_blocks_come_in_the_order_of_one_cycle(self):
        config = validate.from_values(TINY)
        bench = lab.Lab(discovery.find(tiny.build()), tiny.ids(16, 16), config)
        whole = list(bench.batches(5, 7))
        assert all(torch.equal(a, b) for a, b in zip(whole[2:], bench.batches(3, 7, skip=2), strict=True))

    @pytest.mark.parametrize(
        "more",
        [{"method": "angular"}, {"one_shot": True}, {"control": "delete_first"}, {"method": "manual", "layers": "1"}],
    )
    def test_what_cannot_be_taken_in_cycles_is_refused(self, more):
        with pytest.raises(TrspError, match=r"ycles take turns between|names all its layers at once"):
            validate.from_values({"cycles": 2, **more})

    def test_more_cycles_than_layers_are_refused(self):
        config = validate.from_values({"cycles": 9})
        assert "9 cycles" in validate.check(config, 8)[0].message


class TestStates:
    def test_the_places_are_right_behind_each_run(self):
        config = validate.from_values(TINY)
        assert stage2.Equation(config, [1, 2, 4], 6, deleted=False).joins() == {3: 3, 5: 5}
        assert stage2.Equation(config, [0, 5], 6, deleted=False).joins() == {1: 1, 6: 6}
        assert stage2.Equation(config, [1, 2, 4], 3, deleted=True).joins() == {3: 1, 5: 2}

    def test_the_distance_by_hand(self):
        wanted, found = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
        assert losses_module.relative_distance(wanted, found).item() == pytest.approx(0.5)

    def test_a_method_that_removes_no_layer_has_no_such_place(self):
        with pytest.raises(TrspError, match="removes no layer"):
            validate.from_values({"method": "width", "control": "delete_first", "distil": 0.5, "distil_from": "states"})

    @pytest.mark.parametrize("control", ["none", "delete_first"])
    @pytest.mark.parametrize("layers", ["1,2", "0,4"])
    def test_both_ways_to_train_are_held_to_the_dense_states(self, control, layers, text):
        """All of the loss distilled, many steps: the pruned model's states behind the run come nearer to the dense
        model's than plain deletion leaves them."""
        near = self.distance(text, control, layers, 30)
        plain = self.distance(text, control, layers, 0)
        assert near < plain

    def distance(self, text, control, layers, steps) -> float:
        model, chosen = tiny.build(), configs.parse_layers(layers)
        settings = {"control": control, "layers": layers, "distil": 1.0, "distil_from": "states", "anneal": 0.1}
        config = validate.from_values({**TINY, **settings, "method": "manual", "text": text, "stage2_lr": 3e-3})
        stack, dense, ids = discovery.find(model), discovery.find(tiny.build()), _calibration(config)[:4]
        bench = lab.Lab(stack, _calibration(config), config)
        bench.teacher = dense
        first = control == "delete_first"
        if steps:
            with removal.removed(stack, chosen if first else []):
                for _ in stage2.transfer(bench, config, chosen, schedules.Span(0, steps), deleted=first):
                    pass
        places = list(stage2.Equation(config, chosen, tiny.L, deleted=False).joins())
        with torch.no_grad(), hooks.skipped(stack, chosen):
            found, wanted = losses_module.states_at(stack, ids, places), losses_module.states_at(dense, ids, places)
            return sum(losses_module.relative_distance(wanted[p], found[p]).item() for p in places)


class TestAdapters:
    @pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt"])
    def test_they_start_as_nothing_merge_to_what_they_were_and_leave_no_trace(self, model_type):
        model = tiny.build(model_type)
        stack, ids = discovery.find(model), tiny.ids()
        names = [n for n, _ in model.named_modules()]
        with torch.no_grad():
            before = model(input_ids=ids, use_cache=False).logits
            with lora.adapted(stack, 2, 0) as learning:
                assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
                assert 0 < sum(p.numel() for p in learning) < 0.5 * sum(p.numel() for p in model.parameters())
                for parameter in learning:
                    parameter.add_(0.05)
                taught = model(input_ids=ids, use_cache=False).logits
                assert not torch.allclose(taught, before)
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
            with lora.adapted(stack, 2, 0) as learning:
                for parameter in learning:
                    parameter.add_(0.05)
                lora.merge(stack)
            assert torch.allclose(model(input_ids=ids, use_cache=False).logits, taught, atol=1e-4)
        assert [n for n, _ in model.named_modules()] == names
        assert not hasattr(model, "peft_config")

    @pytest.mark.parametrize("control", ["none", "delete_first"])
    def test_a_run_trains_the_adapters_alone(self, control, text):
        folded, _, _ = run(text, control=control, stage2_steps=20, **LORA)
        assert losses(folded)
        first, last = folded.gap_steps[0].lm_loss, folded.gap_steps[-1].lm_loss
        assert last < first
        assert all(s.learning_rate == pytest.approx(1e-2) for s in folded.gap_steps)

    def test_closing_at_every_event_leaves_the_model_bit_identical(self, text):
        settings = {**TINY, **LORA, "text": text, "heldout": text, "model": "tiny", "distil": 0.5, "anneal": 0.5}
        config, model = validate.from_values(settings), tiny.build()
        with torch.no_grad():
            before = model(input_ids=tiny.ids(), use_cache=False).logits
        total = len(list(engine.execute(config, None, (model, tiny.tokenizer()))))
        for stop in range(1, total + 1, 3):
            generator = engine.execute(config, None, (model, tiny.tokenizer()))
            for _ in range(stop):
                next(generator)
            generator.close()
            with torch.no_grad():
                assert torch.equal(model(input_ids=tiny.ids(), use_cache=False).logits, before), f"after event {stop}"


def _calibration(config):
    from trsp_core.data import blocks

    return blocks.prepare(config, tiny.tokenizer()).calibration
