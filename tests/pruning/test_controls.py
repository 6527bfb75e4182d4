"""Controls of stage 2, distillation, and the distance to the dense model."""

from __future__ import annotations

import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest

from tests import ROOT, tiny
from trsp_core.data import blocks
from trsp_core.evaluation import perplexity
from trsp_core.evaluation.losses import next_token_loss
from trsp_core.pruning import engine, validate
from trsp_core.pruning.lab import Lab
from trsp_core.runs import recorder
from trsp_core.runs.store import Store
from trsp_core.schema import events, run_state
from trsp_core.surgery import discovery, hooks, removal

TINY = tiny.SETTINGS | {"kl_blocks": 2, "speed_repeats": 0, "sample_tokens": 0}


def run(text, model=None, **settings):
    config = validate.from_values({**TINY, "text": text, "heldout": text, "model": "tiny", **settings})
    told = list(engine.execute(config, None, (model or tiny.build(), tiny.tokenizer())))
    return run_state.fold(run_state.RunState(), [(n, float(n), e) for n, e in enumerate(told)]), told, config


class TestDeleteFirst:
    def test_it_deletes_then_trains_what_is_left(self, text):
        """Its steps are plain AdamW on the model without the layers, on the blocks that TRSP's stage 2 would see."""
        folded, _, config = run(text, control="delete_first", method="manual", layers="1,3")
        twin = tiny.build()
        stack = discovery.find(twin)
        texts = blocks.prepare(config, tiny.tokenizer())
        lab = Lab(stack, texts.calibration, config)
        with removal.removed(stack, [1, 3]):
            optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
            for ids in lab.batches(3, 0):
                lab.lm_loss(ids).backward()
                optimizer.step()
                optimizer.zero_grad()
            expected = [x for part in perplexity.block_losses(twin, texts.measure["calibration"]) for x in part]
        pruned = next(m for m in folded.measured if (m.state, m.domain) == ("pruned", "calibration"))
        assert pruned.losses == pytest.approx(expected, rel=1e-4)

    def test_its_story_has_no_state_with_the_layers_still_there(self, text, tiny_model):
        folded, told, config = run(text, control="delete_first")
        phases = [e.name for e in told if isinstance(e, events.PhaseStarted)]
        assert phases == [name for name in tiny.planned(config, tiny_model) if name not in ("speed", "save")]
        assert set(folded.perplexity) == {"dense", "direct", "pruned"}
        assert all(e.gaps == [] and e.penalty == 0 for e in folded.gap_steps)
        assert [p.step for p in folded.probes] == [0, 2, 3]
        direct = next(m for m in folded.measured if m.state == "direct")
        assert folded.probes[0].perplexity == pytest.approx(perplexity.perplexity(direct.losses[:2]), rel=1e-5)
        assert len(folded.removed.kept) == 3

    def test_both_see_the_same_blocks_in_the_same_order(self, text):
        """The first step's loss of TRSP is the dense model's, the control's the pruned one's, on one batch."""
        trsp, _, config = run(text, method="manual", layers="1,3")
        control, _, _ = run(text, method="manual", layers="1,3", control="delete_first")
        lab = Lab(discovery.find(tiny.build()), blocks.prepare(config, tiny.tokenizer()).calibration, config)
        ids = next(lab.batches(1, 0))
        assert trsp.gap_steps[0].lm_loss == pytest.approx(lab.loss_without([], ids), rel=1e-5)
        assert control.gap_steps[0].lm_loss == pytest.approx(lab.loss_without([1, 3], ids), rel=1e-5)

    def test_closing_at_every_event_leaves_the_model_bit_identical(self, text):
        model = tiny.build()
        config = validate.from_values(
            {**TINY, "text": text, "heldout": text, "model": "tiny", "control": "delete_first", "method": "laco"}
        )
        with torch.no_grad():
            before = model(input_ids=tiny.ids(), use_cache=False).logits
        total = len(list(engine.execute(config, None, (model, tiny.tokenizer()))))
        for stop in range(1, total):
            generator = engine.execute(config, None, (model, tiny.tokenizer()))
            for _ in range(stop):
                next(generator)
            generator.close()
            with torch.no_grad():
                assert torch.equal(model(input_ids=tiny.ids(), use_cache=False).logits, before), f"after event {stop}"


class TestDistillation:
    def lab(self, **settings):
        config = validate.from_values({**TINY, **settings})
        return Lab(discovery.find(tiny.build()), tiny.ids(8, 16), config)

    def test_the_taught_loss_by_hand(self):
        lab, ids = self.lab(), tiny.ids()
        lab.teacher = discovery.find(tiny.build(seed=1))
        with torch.no_grad():
            student, teacher = (m(input_ids=ids, use_cache=False).logits for m in (lab.model, lab.teacher.model))
            p, q = (x[:, :-1].double().softmax(-1) for x in (teacher, student))
            kl = (p * (p.log() - q.log())).sum(-1).mean().item()
            lm = next_token_loss(student, ids).mean().item()
            told, mixed = lab.taught_loss(ids, 0.25)
        assert told == pytest.approx(lm, rel=1e-6)
        assert mixed.item() == pytest.approx(0.75 * lm + 0.25 * kl, rel=1e-5)
        assert lab.taught_loss(ids, 0.0)[1].item() == pytest.approx(lm, rel=1e-6)

    def test_the_teacher_is_the_dense_model_for_the_control_too(self, text):
        """All of the loss distilled: the first step's gradient is that of the distance to the dense model, so a control
        that removes nothing that matters stays nearer to it than plain training does."""
        near, _, _ = run(text, control="delete_first", distil=1.0, stage2_steps=20)
        plain, _, _ = run(text, control="delete_first", distil=0.0, stage2_steps=20)
        assert near.divergence["pruned"]["heldout"] < plain.divergence["pruned"]["heldout"]


class TestDivergence:
    def test_by_hand(self):
        p, q = (torch.randn(5, 7).log_softmax(-1) for _ in range(2))
        by_hand = (p.exp() * (p - q)).sum(-1).mean().item()
        assert perplexity.divergence(p, q) == pytest.approx(by_hand, rel=1e-6)
        assert perplexity.divergence(p, p) == pytest.approx(0, abs=1e-6)

    def test_a_run_tells_the_distance_of_each_state_on_the_first_blocks(self, text):
        folded, told, config = run(text, method="manual", layers="1,3", stage2_steps=0)
        assert set(folded.divergence) == {"direct", "pruned"}
        event = next(e for e in told if isinstance(e, events.DivergenceMeasured) and e.domain == "calibration")
        assert (event.blocks, event.tokens) == (2, 2 * 23)
        model, ids = tiny.build(), blocks.prepare(config, tiny.tokenizer()).measure["calibration"][:2]
        stack = discovery.find(model)
        with torch.no_grad():
            dense = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            with hooks.skipped(stack, [1, 3]):
                pruned = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        by_hand = [(d.exp() * (d - p)).sum(-1)[:-1].mean().item() for d, p in zip(dense, pruned, strict=True)]
        assert event.divergences == pytest.approx(by_hand, abs=5e-3)
        assert event.kl == pytest.approx(sum(by_hand) / 2, abs=5e-3)
        assert run_state.summary(folded)["kl"]["calibration"]["pruned"] == event.kl

    def test_no_blocks_no_distance(self, text):
        folded, _, _ = run(text, kl_blocks=0, stage2_steps=0)
        assert folded.divergence == {}


@pytest.mark.parametrize("settings", [{"control": "delete_first"}, {"method": "sleb", "stage2_steps": 0}])
def test_the_pages_show_a_control_and_a_scoring_method(settings, text, tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    config = validate.from_values({**TINY, "text": text, "heldout": text, "model": "tiny", **settings})
    folder = Store().create(config)
    recorder.record(folder, engine.execute(config, None, (tiny.build(), tiny.tokenizer())))
    st.cache_resource.clear()
    for page in ("run", "layers", "runs"):
        app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
        app.query_params["run"] = [folder.id]
        app.switch_page(f"pages/views/{page}.py")
        app.run()
        assert not app.exception, [e.value for e in app.exception]
