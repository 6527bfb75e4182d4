"""Rounds of stage 1 that go on, and choices over averaged weights."""

from __future__ import annotations

import math

import pytest

from tests import tiny
from tests.pruning.test_methods import choose, lab_of
from trsp_core.errors import TrspError
from trsp_core.pruning import methods, validate
from trsp_core.pruning.methods import trsp
from trsp_core.schema.events import LayerChosen, StageOneStepped


def rounds_of(told):
    """The layer weights after each step, and the choice, of each round."""
    ends = [e for e in told if isinstance(e, LayerChosen)]
    return [([e.weights for e in told if isinstance(e, StageOneStepped) and e.round == end.round], end) for end in ends]


def test_the_mean_and_the_noise_by_hand():
    history = [[1.0, -0.5], [0.8, -0.5], [0.4, -0.2]]
    assert trsp.averaged(history, 1) == history[-1]
    assert trsp.averaged(history, 2) == pytest.approx([0.6, -0.35])
    assert trsp.averaged(history, 99) == pytest.approx([2.2 / 3, -0.4])
    # |s_0| - |s_1| goes 0.5, 0.3, 0.2: changes of -0.2 and -0.1, 0.05 from their mean
    assert trsp.noise(history, 1, 0) == pytest.approx(math.sqrt(2 * 0.05**2) * math.sqrt(2))
    assert trsp.noise(history, 0, 1) == pytest.approx(trsp.noise(history, 1, 0))
    assert trsp.noise(history[:2], 1, 0) == math.inf, "one change has no spread"


def test_an_average_is_what_is_compared():
    told, chosen = choose("trsp", 3, tiny.build(n_layers=8), stage1_steps=4, stage1_average=3)
    weights_in = {end.round: trsp.averaged(weights, 3) for weights, end in rounds_of(told)}
    for number, layer in enumerate(chosen, 1):
        free = [i for i in range(8) if i not in chosen[: number - 1]]
        assert layer == min(free, key=lambda i: (abs(weights_in[number][i]), i))


@pytest.mark.parametrize("one_shot", [False, True])
def test_of_a_shortlist_the_layer_is_chosen_that_the_loss_misses_least(one_shot):
    told, chosen = choose("trsp", 3, tiny.build(n_layers=8), stage1_steps=2, shortlist=4, one_shot=one_shot)
    lab, config = lab_of("trsp", tiny.build(n_layers=8))
    weights_in = {e.round: e.weights for e in told if isinstance(e, StageOneStepped)}  # after the round's last step
    overruled = 0
    for number, end in enumerate(e for e in told if isinstance(e, LayerChosen)):
        gone, weights = chosen[:number], weights_in[end.round]
        shortlist = sorted((i for i in range(8) if i not in gone), key=lambda i, w=weights: (abs(w[i]), i))[:4]
        losses = {i: sum(lab.loss_without([*gone, i], ids) * len(ids) for ids in lab.sample(config)) for i in shortlist}
        assert end.layer == chosen[number] == min(losses, key=losses.get)
        assert (end.score, end.margin) == (weights[end.layer], None)
        overruled += end.layer != shortlist[0]
    assert overruled, "the smallest weight was the best one each time, so this shows nothing"


@pytest.mark.parametrize("one_shot", [False, True])
def test_a_round_goes_on_while_its_margin_is_within_its_noise(one_shot):
    told, _ = choose("trsp", 3, tiny.build(n_layers=8), stage1_steps=3, stage1_stretch=4, one_shot=one_shot)
    rounds = rounds_of(told)
    steps = [e.step for e in told if isinstance(e, StageOneStepped)]
    assert steps == list(range(1, len(steps) + 1))
    gone, taken = [], 3 if one_shot else 1
    for weights, end in [rounds[-1]] if one_shot else rounds:  # all are chosen after one round, or one after each
        clear = {}
        for n in range(3, len(weights) + 1, 3):
            sizes = [abs(w) for w in weights[n - 1]]
            ranked = sorted((i for i in range(8) if i not in gone), key=lambda i, sizes=sizes: (sizes[i], i))
            winner, next_one = ranked[taken - 1 : taken + 1]
            clear[n] = sizes[next_one] - sizes[winner] > trsp.noise(weights[:n], winner, next_one)
        assert list(clear)[-1] == len(weights)
        assert not any(list(clear.values())[:-1]), "it went on although the choice was clear"
        assert clear[len(weights)] or len(weights) == 12
        gone.append(end.layer)
    assert one_shot or any(len(weights) > 3 for weights, _ in rounds), "none was near enough to go on"


def test_the_first_steps_of_a_round_that_goes_on_are_those_of_one_that_does_not():
    short, long = (choose("trsp", 1, stage1_steps=4, stage1_stretch=n)[0] for n in (1, 3))
    assert long[:4] == short[:4]
    whole = choose("trsp", 1, stage1_steps=len(long) - 1)[0]
    assert [e for e in whole if isinstance(e, StageOneStepped)] == long[:-1], "it reads on where it was"


def test_the_most_steps_are_what_is_forecast_and_cycles_are_refused():
    config = validate.from_values({"stage1_steps": 5, "stage1_stretch": 4})
    assert methods.most_steps(config, 3) == 60
    assert methods.most_steps(validate.from_values({"stage1_steps": 5, "stage1_stretch": 4, "one_shot": True}), 3) == 20
    assert methods.most_steps(validate.from_values({"stage1_stretch": 4, "method": "masks"}), 3) == 30
    with pytest.raises(TrspError, match="rounds that go on"):
        validate.from_values({"cycles": 2, "stage1_stretch": 2})
