"""What-ifs: whatever was kept from earlier sets, the figures are those of a full pass without the layers."""

import math
import random

import pytest
import torch

from tests import tiny
from trsp_core.evaluation import layer_removal
from trsp_core.evaluation.losses import next_token_loss
from trsp_core.perf import head_loss
from trsp_core.surgery import discovery, hooks, removal

SETS = [set(), {3}, {1, 3}, {1}, {0, 2}, {0}, {4}, {3, 4}, {0, 1, 2, 3}, {1, 3}]


def full(stack, ids, removed):
    """Loss and KL to dense by a plain pass with the layers gone."""
    with torch.inference_mode():
        dense = torch.log_softmax(stack.model(input_ids=ids, use_cache=False).logits[:, :-1].double(), -1)
        with removal.removed(stack, removed):
            logits = stack.model(input_ids=ids, use_cache=False).logits
        logs = torch.log_softmax(logits[:, :-1].double(), -1)
        kl = (dense.exp() * (dense - logs)).sum(-1).mean()
        return float(next_token_loss(logits, ids).mean()), float(kl)


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_reuse_equals_a_full_pass(family):
    stack, ids = discovery.find(tiny.build(family)), tiny.ids(2, 20)
    path = layer_removal.Path(stack, ids)
    for removed in SETS:
        loss, kl = full(stack, ids, removed)
        found = path.figures(frozenset(removed))
        assert found.loss == pytest.approx(loss, abs=1e-5), (family, removed)
        assert found.kl == pytest.approx(kl, abs=1e-5), (family, removed)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])  # plain, with a bias, with capped logits
def test_slices_of_the_vocabulary_give_the_same_figures(family, monkeypatch):
    stack, ids = discovery.find(tiny.build(family)), tiny.ids(2, 20)
    monkeypatch.setattr(head_loss, "SLICE", 50)
    path = layer_removal.Path(stack, ids)
    assert path.figures(frozenset()).kl == pytest.approx(0, abs=1e-6)
    assert head_loss.projects(stack.model, ids) == (family != "gemma2")
    for removed in SETS:
        found = path.figures(frozenset(removed))
        assert (found.loss, found.kl) == pytest.approx(full(stack, ids, removed), abs=1e-5)


def test_a_change_costs_only_what_is_above_it():
    path = layer_removal.Path(discovery.find(tiny.build()), tiny.ids())
    assert path.figures(frozenset()).layers_run == tiny.L
    assert path.figures(frozenset({4})).layers_run == 0  # nothing above it but the head
    assert path.figures(frozenset({2})).layers_run == 2
    assert path.figures(frozenset({2, 4})).layers_run == 0  # layers 0 to 3 without 2 were run a moment ago
    assert path.figures(frozenset({0})).layers_run == 4
    assert path.start(frozenset({0, 3})) == 3


def test_memory_of_kept_states_is_bounded_and_the_dense_ones_stay():
    stack, ids = discovery.find(tiny.build()), tiny.ids()
    one = ids.numel() * tiny.D * 4
    path, draw = layer_removal.Path(stack, ids, most_bytes=12 * one), random.Random(0)
    for _ in range(30):
        removed = frozenset(draw.sample(range(tiny.L), draw.randint(0, 4)))
        assert path.figures(removed).loss == pytest.approx(full(stack, ids, removed)[0], abs=1e-5)
        assert len(path.states.by_key) <= 12
    assert all((i, frozenset()) in path.states.by_key for i in range(tiny.L + 1))


def test_nothing_is_left_on_the_model():
    stack, ids = discovery.find(tiny.build()), tiny.ids()
    with torch.inference_mode():
        before = stack.model(input_ids=ids, use_cache=False).logits
    layer_removal.Path(stack, ids).figures(frozenset({1}))
    with torch.inference_mode():
        assert torch.equal(stack.model(input_ids=ids, use_cache=False).logits, before)
    assert not any("forward" in layer.__dict__ or layer._forward_hooks for layer in stack.layers)


def test_block_influence_is_one_minus_the_mean_cosine():
    stack, ids = discovery.find(tiny.build()), tiny.ids()
    with torch.inference_mode(), hooks.tapped(stack, [2]) as taps:
        stack.model(input_ids=ids, use_cache=False)
        x_in, x_out = taps[2]
        cosine = (x_in * x_out).sum(-1) / (x_in.norm(dim=-1) * x_out.norm(dim=-1))
    assert layer_removal.Path(stack, ids).influence(2) == pytest.approx(float(1 - cosine.mean()), abs=1e-6)


def test_the_dense_model_is_at_no_distance_from_itself():
    kl = layer_removal.Path(discovery.find(tiny.build()), tiny.ids()).figures(frozenset()).kl
    assert math.isclose(kl, 0.0, abs_tol=1e-6)
