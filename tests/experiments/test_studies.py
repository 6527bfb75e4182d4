"""A study: figures over splits against sums by hand, intervals that hold the truth as often as they say, nothing ranked
that is equal, and what the steps of stage 1 say of a choice."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics

import pytest

from tests import ROOT
from tests import studies as made_up
from tests.story import L
from trsp_core.evaluation import intervals
from trsp_core.experiments import grid_results, grids, studies
from trsp_core.experiments.grids import Contest
from trsp_core.experiments.studies import SplitStudy, StudyRow
from trsp_core.runs import recorder
from trsp_core.runs.store import Store
from trsp_core.schema import events as ev
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import DOMAINS

TIME = Contest("refit_10", "none_90", "time")


def study(sweep) -> SplitStudy:
    read = studies.read(sweep)
    assert read
    return read


def row(of: SplitStudy, arm: str) -> StudyRow:
    return next(row for row in of.rows if row.arm == arm)


def test_a_figure_over_splits_is_the_mean_of_the_splits_and_not_of_their_blocks():
    of = study(made_up.transfers())
    one, other = row(of, "refit_10"), row(of, "none_10")
    for domain in DOMAINS:
        logs = [statistics.fmean(p.losses[domain]) for p in one.points.values()]
        rivals = [statistics.fmean(p.losses[domain]) for p in other.points.values()]
        level, ratio = studies.perplexity(one, domain), studies.ratio(one, other, domain)
        assert list(level.by_split.values()) == pytest.approx([math.exp(v) for v in logs])
        assert level.interval == intervals.perplexity(logs)
        assert ratio.interval == intervals.factor(logs, rivals)
        reach = 2.7764 * statistics.stdev(a - b for a, b in zip(logs, rivals, strict=True)) / math.sqrt(5)
        assert math.log(ratio.interval.high / ratio.interval.value) == pytest.approx(reach, rel=1e-4)
        assert ratio.sign == -1
        dense = [statistics.fmean(made_up.losses(2.9, seed)) for seed in range(5)]
        assert studies.over_dense(of, one, domain).interval == intervals.factor(logs, dense)


def test_only_splits_that_were_measured_on_the_same_blocks_are_paired():
    of = study(made_up.transfers())
    one, other = row(of, "refit"), row(of, "direct")
    points = {**other.points, 3: dataclasses.replace(other.points[3], blocks=dict.fromkeys(DOMAINS, "others"))}
    del points[4]
    rest = dataclasses.replace(other, points=points)
    assert list(studies.ratio(one, rest, "heldout").by_split) == [0, 1, 2]
    assert studies.ratio(one, dataclasses.replace(rest, points={3: points[3]}), "heldout") is None
    assert studies.over_dense(of, rest, "heldout").by_split.keys() == {0, 1, 2}


def test_each_transfer_is_set_beside_the_control_of_the_same_layers_and_steps():
    pairs = [(p.row.arm, p.other.arm, p.equal) for p in study(made_up.transfers(contests=[TIME])).pairs]
    assert pairs == [
        ("refit", "direct", "steps"),
        ("refit_10", "none_90", "time"),
        ("refit_10", "none_10", "steps"),
        ("penalty_10", "none_10", "steps"),
    ]
    of = study(made_up.transfers())
    assert ("refit_10", "none_90") not in [(p.row.arm, p.other.arm) for p in of.pairs]
    assert of.reference is None
    sweep = made_up.transfers()
    points = [dataclasses.replace(p, removed=[1]) if p.arm == "none_10" else p for p in sweep.points]
    others = study(dataclasses.replace(sweep, points=points))
    assert [p.row.arm for p in others.pairs] == ["refit"], "other layers isolate nothing"
    assert study(made_up.choices()).reference.arm == "trsp"
    assert study(made_up.choices()).of_choices


def test_rows_without_a_control_stand_beside_the_first():
    sweep = made_up.transfers()
    of = study(dataclasses.replace(sweep, points=[p for p in sweep.points if p.arm in ("direct", "refit_10")]))
    assert [(p.row.arm, p.other.arm, p.equal) for p in of.contests] == [("refit_10", "direct", "")]
    assert not of.of_choices
    assert "beside Title of direct" in studies.cells(of)[0]


def test_one_split_is_no_study_and_a_row_of_one_split_has_no_interval():
    assert studies.read(made_up.transfers(splits=[0])) is None
    sweep = made_up.transfers()
    points = [p for p in sweep.points if p.arm != "refit" or p.seed == 2]
    of = study(dataclasses.replace(sweep, points=points))
    figure = studies.ratio(row(of, "refit"), row(of, "direct"), "heldout")
    assert figure.sign == 0
    assert "(one split)" in studies.in_words(figure, str)
    (line,) = [line for line in studies.cells(of) if line[0] == "Title of refit"]
    assert line[1] == "1"


def test_a_diverged_split_makes_an_endless_interval_and_no_claim():
    sweep = made_up.transfers()
    nan = {d: [math.nan] * 12 for d in DOMAINS}
    points = [dataclasses.replace(p, losses=nan) if p.arm == "refit" and p.seed == 1 else p for p in sweep.points]
    of = study(dataclasses.replace(sweep, points=points))
    assert studies.ratio(row(of, "refit"), row(of, "direct"), "heldout").sign == 0
    assert studies.cells(of)
    assert studies.ranked(of.rows, "heldout").best.arm in ("refit_10", "none_90")


# -- what intervals over splits are worth


def bare_row(name: str, by_split: list[list[float]]) -> StudyRow:
    """A row with these losses of the blocks of each split, and nothing else."""
    template = made_up.point(name, {"seed": 0}, (0, 0))
    points = {
        seed: dataclasses.replace(template, losses={"heldout": losses}, seed=seed)
        for seed, losses in enumerate(by_split)
    }
    return StudyRow(name, name, {}, points, {})


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("kind", ["normal", "gumbel"])
def test_ratios_over_splits_cover_the_truth_as_often_as_they_say(splits, kind):
    """Two rows on blocks whose difficulty varies far more than what the rows differ by: by the texts of the split, by
    the block, and by what the split's calibration texts do to each row, which its blocks share. As if all blocks were
    independent, the interval would promise too much."""
    import numpy as np

    draw, count, blocks = np.random.default_rng(splits), 2000, 6
    spread = draw.normal(0, 0.04, (2, count, splits))
    if kind == "gumbel":  # now and then a split on which a row comes out far worse
        spread = draw.gumbel(0, 0.03, (2, count, splits)) - 0.03 * float(np.euler_gamma)
    texts = draw.normal(0, 0.2, (count, splits, 1)) + draw.normal(0, 0.3, (count, splits, blocks))
    own = draw.normal(0, 0.03, (2, count, splits, blocks))
    one, other = (level + texts + spread[n][..., None] + own[n] for n, level in enumerate((3.5, 3.6)))
    hits, pooled_hits = 0, 0
    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        figure = studies.ratio(bare_row("a", a), bare_row("b", b), "heldout").interval
        pooled = intervals.factor([*itertools.chain(*a)], [*itertools.chain(*b)])
        hits += figure.low <= math.exp(-0.1) <= figure.high
        pooled_hits += pooled.low <= math.exp(-0.1) <= pooled.high
    assert hits / count >= 0.94
    assert pooled_hits / count < 0.9


def test_equals_are_hardly_ever_ranked():
    """Six rows of the same mean over five splits: none is first, but by chance in fewer than 5 % of studies."""
    import numpy as np

    draw, firsts, count = np.random.default_rng(0), 0, 300
    for _ in range(count):
        levels = 4 + draw.normal(0, 0.2, (1, 5, 1)) + draw.normal(0, 0.1, (6, 5, 1))
        rows = [bare_row(str(n), by_split) for n, by_split in enumerate(levels.tolist())]
        firsts += not studies.ranked(rows, "heldout").level
    assert firsts / count < 0.05


def test_what_the_intervals_hold_is_ranked():
    of = study(made_up.choices())
    order = studies.ranked(of.rows, "heldout")
    assert {order.best.arm, *(r.arm for r in order.level)} == {"trsp", "sleb"}
    assert [r.arm for r in order.behind] == ["last"]
    assert studies.ranked([row(of, "last"), row(of, "sleb")], "heldout").level == []


# -- the spread of choices


def test_the_spread_of_a_choice_counts_layers_pairs_of_splits_and_narrow_rounds():
    (spread,) = study(made_up.transfers()).spreads
    assert spread.row.arm == "direct", "the others take its layers over"
    assert spread.counts == [0, 0, 5, 4, 1, 0, 0, 0]
    assert spread.agreement == pytest.approx((6 * 1 + 4 * 1 / 3) / 10)
    assert (spread.close, spread.rounds) == (5, 10)
    head, line = studies.spread_cells(study(made_up.transfers()))
    assert line == ["Title of direct", "5", "0.73", "5 of 10", "2", "3 (4), 4 (1)"]
    assert len(head) == len(line)


def stage_1(weights: list[list[float]], margin: float):
    """A run that chose layer 1 before layer 2 after these steps."""
    yield ev.ModelLoaded("tiny", "LlamaForCausalLM", L, 32, 128, 60_000, [8_000] * L, 240_000, "float32", "cpu")
    for step, values in enumerate(weights, 1):
        yield ev.StageOneStepped(step, 1, 3.0, sum(values), values)
    yield ev.LayerChosen(1, 1, weights[-1][1], 2, margin)
    yield ev.LayersChosen("trsp", [1])
    for state in ("dense", "pruned"):
        for domain in DOMAINS:
            yield ev.TextPrepared(domain, "measure", "wikipedia", 4, 2, 8, 16, f"{domain}-0")
            yield ev.PerplexityMeasured(state, domain, 20.0, [3.0, 3.0], "wikipedia", 2, 8, 14, "float32")
    yield ev.LayersRemoved([1], [0, 2, 3, 4, 5], 60_000, 52_000, 240_000, 208_000)
    yield ev.RunFinished(10**9)


def recorded(tmp_path, weights, margin):
    """The point of such a run in the record of its grid."""
    grid = grids.parse({"name": "g", "base": {"ratio": 0.2}, "axes": {"seed": [0]}})
    run = Store(tmp_path).create(RunConfig(ratio=0.2))
    recorder.record(run, stage_1(weights, margin))
    sweep = grid_results.gather(grid, {grid.plan.variations[0].name: (run, run.state())})
    assert sweep.n_layers == L
    grid_results.write(sweep, tmp_path / "g.json")
    assert grid_results.load(tmp_path / "g.json") == sweep
    return sweep.points[0]


def test_the_noise_of_a_round_is_what_chance_would_have_moved_its_margin_by(tmp_path):
    """The lead of layer 2's weight over layer 1's goes 0.1, 0.4, 0.2: by 0.3, then by -0.2."""
    ones = [1.0] * (L - 3)
    steps = [[1.0, 0.7, 0.8, *ones], [1.0, -0.2, 0.6, *ones], [1.0, 0.3, 0.5, *ones]]
    point = recorded(tmp_path, steps, 0.5 - 0.3)
    (round_,) = point.rounds
    assert (round_.layer, round_.margin) == (1, 0.2)
    assert round_.noise == pytest.approx(statistics.stdev([0.3, -0.2]) * math.sqrt(2), rel=1e-3)


def test_two_steps_a_round_or_weights_that_did_not_decide_say_nothing_of_noise(tmp_path):
    steps = [[1.0, 0.3, 0.5, *[1.0] * (L - 3)]]
    assert recorded(tmp_path / "two", steps * 2, 0.2).rounds == []
    assert recorded(tmp_path / "other", steps * 3, 0.9).rounds == []
    assert recorded(tmp_path / "three", steps * 3, 0.2).rounds != []


# -- ratios


def test_where_a_treatment_breaks_is_said_by_the_dense_model_and_by_split():
    of = study(made_up.ratios())
    assert studies.breaking_ratio(of, "direct", "heldout") == (0.4, 0.4)
    assert studies.breaking_ratio(of, "refit", "heldout") == (0.6, None)
    head, direct, refit = studies.ratio_cells(of)
    assert head[1:] == ["0.2", "0.4", "0.6", "over 10 times dense, held out"]
    assert direct[-1] == "at 0.4"
    assert refit[-1] == "at 0.6 on some split, nowhere on all"
    assert [p.row.at == p.other.at for p in of.pairs] == [True] * 3


# -- grids, records and the shell


@pytest.mark.parametrize(
    "contest",
    [{"arm": "a"}, {"arm": "a", "other": "c", "equal": "time"}, {"arm": "a", "other": "b", "equal": "luck"}, 3],
)
def test_a_contest_names_two_arms_and_what_is_equal(contest):
    document = {"name": "g", "axes": {"seed": [0]}, "arms": [{"name": "a"}, {"name": "b"}]}
    assert grids.parse({**document, "contests": [{"arm": "a", "other": "b", "equal": "time"}]}).contests
    with pytest.raises(grids.TrspError, match="no grid"):
        grids.parse({**document, "contests": [contest]})


def test_a_record_keeps_contests_and_refuses_what_no_study_can_have(tmp_path):
    sweep, file = made_up.transfers(contests=[TIME]), tmp_path / "a.json"
    grid_results.write(sweep, file)
    assert grid_results.load(file) == sweep
    document = json.loads(file.read_text("utf-8"))
    for change in ({"n_layers": 10**9}, {"points": [{**document["points"][0], "removed": [8]}]}):
        file.write_text(json.dumps({**document, **change}))
        with pytest.raises(grids.TrspError, match="no record"):
            grid_results.load(file)


@pytest.mark.parametrize("sweep", [made_up.transfers(), made_up.choices(), made_up.ratios()], ids=lambda s: s.name)
def test_every_table_of_a_study_is_rectangular(sweep):
    of = study(sweep)
    assert "KL, nats a token" not in studies.cells(of)[0]
    points = [dataclasses.replace(p, kl={"calibration": 0.5, "heldout": p.seed}) for p in sweep.points]
    measured = study(dataclasses.replace(sweep, points=points))
    column = studies.cells(measured)[0].index("KL, nats a token")
    middle = statistics.fmean(sweep.axes["seed"])
    assert {line[column] for line in studies.cells(measured)[1:]} == {f"0.50 / {middle:.2f}"}
    for table in (studies.cells(of), studies.cells(measured), studies.spread_cells(of), studies.ratio_cells(of)):
        assert len({len(line) for line in table}) == 1


def test_the_study_of_the_docs_is_one():
    section = (ROOT / "docs" / "cli.md").read_text("utf-8").split("## Studies over splits")[1]
    grid = grids.parse(json.loads(section.split("```json")[1].split("```")[0]))
    assert grid.contests == (TIME,)
    assert len(grid.axes["seed"]) == 5


@pytest.mark.parametrize("name", ["splits", "choices", "ratios"])
def test_the_grids_of_the_studies_can_be_read(name):
    assert grids.read(str(ROOT / "benchmarks" / "grids" / f"{name}.json")).axes["seed"]


def test_records_that_ship_are_studies_where_they_have_several_seeds():
    for file in grid_results.shipped().glob("*.json"):
        sweep = grid_results.load(file)
        assert bool(studies.read(sweep)) == (len(sweep.axes.get("seed", [])) > 1)
