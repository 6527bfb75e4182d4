"""Methods that choose a set of layers as a whole: pairwise choice and search by swaps, against closed forms, against
trying all sets, and by what they tell."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests import tiny
from tests.pruning.test_methods import DEPTH, choose, drain, lab_of
from trsp_core.errors import TrspError
from trsp_core.models import catalog
from trsp_core.preparation import forecast
from trsp_core.pruning import methods, validate
from trsp_core.pruning.methods import pairwise, swaps
from trsp_core.schema.events import LayerChosen, LayersScored


def problem(seed):
    """H of random rows, some layers much louder than others, with fewer rows than layers in some: (H, L, K)."""
    draws = random.Random(seed)
    n, count, m = draws.choice([8, 10, 12]), draws.choice([2, 3, 4, 5]), draws.choice([3, 6, 20, 40])
    rows = [[draws.gauss(0, draws.choice([0.1, 1, 3])) for _ in range(n)] for _ in range(m)]
    return pairwise.energies(rows), n, count


def others(n_layers):
    return lambda chosen: [i for i in range(n_layers) if i not in chosen]


class TestPairwise:
    def test_the_energies_by_hand(self):
        assert pairwise.energies([[1.0, 2.0], [3.0, -4.0]]) == [[5.0, -5.0], [-5.0, 10.0]]
        assert pairwise.energy([[5.0, -5.0], [-5.0, 10.0]], (0, 1)) == 5.0

    def test_two_layers_that_undo_each_other_go_together(self):
        """By a score a layer, 2 and 3 would go: alone they cost least."""
        rows = [[3.0, -3.0, 1.0, 1.0], [-2.0, 2.0, 1.0, 1.0]]
        H = pairwise.energies(rows)
        assert pairwise.lowest(H, 2, others(4))[0] == (0, 1)
        assert sorted(range(4), key=lambda i: H[i][i])[:2] == [2, 3]

    @pytest.mark.parametrize("seed", range(20))
    def test_the_lowest_set_is_that_of_trying_all(self, seed):
        H, n, count = problem(seed)
        every = sorted(itertools.combinations(range(n), count), key=lambda layers: pairwise.energy(H, layers))
        finalists = pairwise.lowest(H, count, others(n))
        energies = [pairwise.energy(H, layers) for layers in finalists]
        assert energies[0] == pytest.approx(pairwise.energy(H, every[0]), rel=1e-9, abs=1e-12)
        assert energies == pytest.approx(sorted(energies))
        assert len(set(finalists)) == min(len(every), pairwise.FINALISTS)

    def test_a_rise_is_the_difference_of_two_energies(self):
        H, n, _ = problem(1)
        for layers, rise in pairwise.swaps(H, (0, 2, 5), others(n)).items():
            assert rise == pytest.approx(pairwise.energy(H, layers) - pairwise.energy(H, (0, 2, 5)))

    def test_a_large_problem_is_the_same_again(self):
        draws = random.Random(0)
        H = pairwise.energies([[draws.gauss(0, 1) for _ in range(40)] for _ in range(60)])
        assert pairwise.lowest(H, 10, others(40)) == pairwise.lowest(H, 10, others(40))

    def test_no_set_is_refused_by_reason(self):
        with pytest.raises(TrspError, match="No set of 3 layers"):
            pairwise.lowest([[1.0] * 3] * 3, 3, lambda chosen: [i for i in (0, 2) if i not in chosen])

    @pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mixtral"])
    def test_the_gradients_of_all_blocks_at_once_are_those_of_stage_1(self, model_type):
        lab, config = lab_of("pairwise", tiny.build(model_type, n_layers=DEPTH), protect_last=1)
        with lab.learning([]):
            rows = pairwise.gradients(lab, config, lab.blocks[:3])
            for block, row in zip(lab.blocks[:3], rows, strict=True):
                s = torch.ones(DEPTH, requires_grad=True)
                with lab.gated(s, "branch", range(DEPTH - 1)):
                    lab.gate_loss(s, block[None]).backward()
                assert row == pytest.approx(s.grad.tolist(), rel=1e-4, abs=1e-7)
                assert row[-1] == 0

    def test_a_gradient_is_how_the_loss_moves_with_the_gate(self):
        lab, config = lab_of("pairwise")
        with lab.learning([]):
            (row,) = pairwise.gradients(lab, config, lab.blocks[:1])
        losses = []
        for weight in (0.99, 1.01):
            s = torch.ones(DEPTH)
            s[2] = weight
            with torch.no_grad(), lab.gated(s, "branch", [2]):
                losses.append(lab.lm_loss(lab.blocks[:1]).item())
        assert row[2] == pytest.approx((losses[1] - losses[0]) / 0.02, rel=0.02)

    def test_the_loss_decides_among_the_lowest(self):
        """Not the energy: with as many finalists as there are sets, the best of all sets by loss is taken."""
        lab, config = lab_of("pairwise", protect_first=1, score_blocks=3)
        _, chosen = drain(methods.get("pairwise").choose(lab, config, 3))
        sets = list(itertools.combinations(range(1, DEPTH), 3))
        assert len(sets) == pairwise.FINALISTS
        losses = {layers: lab.loss_without(layers, lab.blocks[:3]) for layers in sets}
        assert tuple(sorted(chosen)) == min(sets, key=losses.__getitem__)


class TestSwaps:
    def test_a_child_is_one_to_three_swaps_away(self):
        lab, config = lab_of("swaps", tiny.build(n_layers=12), protect_first=1)
        draws, apart = random.Random(0), []
        for _ in range(200):
            layers = swaps.child(lab, config, (2, 4, 6, 8), draws)
            assert layers == tuple(sorted(set(layers)))
            assert len(layers) == 4
            assert 0 not in layers
            apart.append(len({2, 4, 6, 8} - set(layers)))
        assert set(apart) <= {0, 1, 2, 3}
        assert apart.count(1) > apart.count(2) > apart.count(3) > 0

    def test_the_fitness_is_the_divergence_from_the_dense_model(self):
        lab, config = lab_of("swaps", score_blocks=4)
        told, _ = drain(methods.get("swaps").choose(lab, config, 2))
        scores = next(e for e in told if isinstance(e, LayersScored)).scores
        ids = lab.blocks[:2]
        with torch.no_grad():
            dense = lab.model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            with lab.skipped([3]):
                pruned = lab.model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        kl = (dense.exp() * (dense - pruned)).sum(-1).mean().item()
        assert scores[3] == pytest.approx(kl, rel=1e-4)

    def test_the_search_is_never_worse_than_its_first_parent(self):
        lab, config = lab_of("swaps", tiny.build(n_layers=8, seed=3), score_blocks=4)
        told, chosen = drain(methods.get("swaps").choose(lab, config, 3))
        scores = next(e for e in told if isinstance(e, LayersScored)).scores
        first = sorted(range(8), key=lambda i: scores[i])[:3]

        def divergence(layers):
            with torch.no_grad():
                dense = lab.model(input_ids=lab.blocks[:4], use_cache=False).logits[:, :-1].double().log_softmax(-1)
                with lab.skipped(layers):
                    pruned = lab.model(input_ids=lab.blocks[:4], use_cache=False).logits[:, :-1].double()
            return (dense.exp() * (dense - pruned.log_softmax(-1))).sum(-1).mean().item()

        assert divergence(chosen) <= divergence(first) * (1 + 1e-5)


@pytest.mark.parametrize("method", ["pairwise", "swaps"])
def test_a_set_is_told_from_the_lowest_score_up(method):
    told, chosen = choose(method, 3)
    scores = [e.score for e in told if isinstance(e, LayerChosen)]
    assert scores == sorted(scores)
    by_layer = next(e for e in told if isinstance(e, LayersScored)).scores
    assert scores == [by_layer[i] for i in chosen]


def test_what_they_hold_is_in_the_forecast(tmp_path):
    """Pairwise keeps a pass for the way back; swaps keep states and the dense model's probabilities."""
    tiny.save(tmp_path)
    facts, peaks = catalog.facts(str(tmp_path)), {}
    for method in ("last", "shortgpt", "pairwise", "swaps"):
        config = validate.from_values({"method": method, "stage2_steps": 0, "save_model": False, "score_blocks": 4096})
        peaks[method] = forecast.peak_bytes(config, facts)
    assert peaks["last"] == peaks["shortgpt"] < peaks["pairwise"]
    assert peaks["swaps"] - peaks["last"] >= 4 * 4096 * 128 * facts.vocabulary
