"""The law of lost steps: planted figures come back, intervals hold them, sentences follow, and the shipped records say
what is said of them."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from tests import ROOT
from trsp_core.experiments import lost_steps
from trsp_core.schema.events import DOMAINS

LENGTHS = (30, 120, 480)


def planted(worth, slope=0.09, share=0.25, blocks=16, noise=0.0, seed=0):
    """Losses of a control that obeys the law, and of fading whose steps are worth `worth`, by number of steps."""
    draws = random.Random(seed)
    levels = [draws.gauss(4, 0.4) for _ in range(blocks)]
    slopes = [slope + noise * draws.gauss(0, 1) for _ in range(blocks)]
    had = math.log(1 - share * (1 - worth))
    control = {t: [a - b * math.log(t) for a, b in zip(levels, slopes, strict=True)] for t in LENGTHS}
    fading = {
        t: [loss - b * had + 0.05 * noise * draws.gauss(0, 1) for loss, b in zip(control[t], slopes, strict=True)]
        for t in LENGTHS
    }
    return control, fading


@pytest.mark.parametrize("worth", [-0.5, 0.0, 0.4, 1.0, 1.5])
def test_what_is_planted_comes_back(worth):
    for row in lost_steps.law(*planted(worth), share=0.25):
        assert row.worth.value == pytest.approx(worth, abs=1e-9)
        assert row.slope.value == pytest.approx(0.09)
        assert row.ratio.value == pytest.approx((1 - 0.25 * (1 - worth)) ** -0.09)
        assert row.useless == pytest.approx((4 / 3) ** 0.09)
        assert row.worth.low == pytest.approx(row.worth.high, abs=1e-6), "blocks that agree leave no doubt"


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Blocks of different slopes, and noise of their own: 95 %, give or take what 600 draws leave open."""
    held = [lost_steps.law(*planted(0.4, noise=0.06, seed=n), share=0.25)[1].worth for n in range(600)]
    assert all(u.low <= u.value <= u.high for u in held)
    assert 0.93 <= sum(u.low <= 0.4 <= u.high for u in held) / len(held) <= 0.98


def test_the_slope_is_that_of_the_ways_beside():
    control = {10: [3.0, 5.0], 100: [2.0, 4.5], 1000: [1.5, 4.4]}
    tens = math.log(10)
    assert lost_steps.block_slopes(control, 10) == pytest.approx([1 / tens, 0.5 / tens])
    assert lost_steps.block_slopes(control, 100) == pytest.approx([0.75 / tens, 0.3 / tens])
    assert lost_steps.block_slopes(control, 1000) == pytest.approx([0.5 / tens, 0.1 / tens])
    with pytest.raises(ValueError, match="two lengths"):
        lost_steps.block_slopes({10: [3.0]}, 10)


def test_a_control_that_does_not_learn_for_sure_leaves_no_interval():
    worth = lost_steps.law(*planted(0.4, slope=0.001, noise=0.5), share=0.25)[0].worth
    assert (worth.low, worth.high) == (-math.inf, math.inf)
    assert lost_steps.in_words(worth).endswith(" [no interval]")
    flat = {t: [3.0, 3.0] for t in LENGTHS}
    flat_worth = lost_steps.law(flat, flat, 0.25)[0].worth
    assert math.isnan(flat_worth.value)
    assert lost_steps.in_words(flat_worth) == "not a number [no interval]"


def test_the_arms_are_paired_with_the_control_of_the_same_loss():
    sweep = lost_steps.recorded()
    laws = lost_steps.of_sweep(sweep, "heldout")
    assert {arm: [row.steps for row in rows] for arm, rows in laws.items()} == {
        "Fade out": [30, 120],
        "Fade, distil": [30, 120, 240, 600],
    }
    assert all(row.share == 0.25 for rows in laws.values() for row in rows)
    alone = dataclasses.replace(sweep, points=[p for p in sweep.points if p.arm != "control_distil"])
    assert list(lost_steps.of_sweep(alone, "heldout")) == ["Fade out"]


def test_sentences_follow_from_the_figures():
    laws = {d: {"An arm": lost_steps.law(*planted(0.4), share=0.25)} for d in DOMAINS}
    first, home, _ = lost_steps.sentences(laws)
    assert first.startswith("In every comparison a step of fading is surely worth less")
    assert first.endswith("in none surely more.")
    assert home == (
        "In the calibration domain (An arm) it is worth 0.40 [0.40, 0.40] of a step after 30 steps, and 0.40 "
        "[0.40, 0.40] after 480."
    )
    laws["heldout"] = {"An arm": lost_steps.law(*planted(1.5), share=0.25)}
    assert lost_steps.sentences(laws)[0].startswith("In 3 of 6 comparisons")
    assert lost_steps.sentences(laws)[0].endswith("in 3 surely more.")
    assert "nothing can be said" in lost_steps.sentences({})[0]


def test_results_tells_what_the_records_say():
    sweep = lost_steps.recorded()
    laws = {domain: lost_steps.of_sweep(sweep, domain) for domain in DOMAINS}
    page = " ".join((ROOT / "docs" / "results.md").read_text("utf-8").split())
    assert " ".join(lost_steps.sentences(laws)) in page
    for arms in laws.values():
        for cells in lost_steps.table(arms):
            assert " | ".join(cells[1:]) in page
