"""Plans and what they say together: parsing, runs that are never run twice, records, intervals, what may be claimed."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import ROOT, story, tiny
from trsp_core.cli import main as shell_main
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals
from trsp_core.experiments import plan_results, plans, records
from trsp_core.models import catalog
from trsp_core.models.inspection import Facts
from trsp_core.preparation import preflight
from trsp_core.pruning import engine
from trsp_core.runs import process, recorder, steering
from trsp_core.runs.store import Store
from trsp_core.schema import events, turns

TINY = tiny.SETTINGS | {
    "probe_blocks": 1,
    "importance_blocks": 0,
    "kl_blocks": 1,
    "stage1_steps": 1,
    "stage2_steps": 4,
    "sample_tokens": 0,
    "save_model": False,
}
VARIATIONS = [
    {"name": "trsp", "title": "TRSP"},
    {"name": "control", "settings": {"control": "delete_first"}, "layers_of": "trsp"},
    {"name": "timed", "settings": {"control": "delete_first"}, "layers_of": "trsp", "as_long_as": "trsp"},
]


@pytest.fixture
def plan_file(tmp_path, monkeypatch):
    """A plan on a tiny model, in a fresh folder of runs, whose runs happen in this process and are counted."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(1200), "utf-8")
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(preflight, "preflight", lambda config: None)
    facts = Facts("tiny", tmp_path, "LlamaForCausalLM", tiny.L, tiny.D, tiny.V, 512, 50_000, [8_000] * tiny.L, 200_000)
    monkeypatch.setattr(catalog, "facts", lambda name: facts)
    ran = []

    def start(run):
        ran.append(run.id)
        recorder.record(run, engine.execute(run.config(), None, (tiny.build(), tiny.tokenizer())))
        return story.no_child(run)

    monkeypatch.setattr(process, "start", start)
    base = TINY | {"text": str(text), "heldout": str(text)}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"name": "small", "base": base, "variations": VARIATIONS}))
    return file, ran


def test_a_plan_runs_each_variation_once_and_prints_one_table(plan_file, tmp_path, capsys):
    file, ran = plan_file
    out = tmp_path / "record.json"
    assert shell_main.main(["compare", "--plan", str(file), "--out", str(out)]) == 0
    assert len(ran) == 2, "the timed control gets as many steps as the other: one run serves both"
    shown = capsys.readouterr().out
    assert "TRSP" in shown
    assert "calibration domain" in shown
    assert shell_main.main(["compare", "--plan", str(file), "--json"]) == 0
    assert len(ran) == 2, "a finished run is never run again"
    found = plan_results.load(out)
    assert [row.name for row in found.rows] == ["dense", "trsp", "control", "timed"]
    assert found.row("control").removed == found.row("trsp").removed
    assert found.row("trsp").steps == found.row("control").steps == 4
    assert found.row("timed").steps >= 4, "its steps are cheaper, so it gets as many or more"
    assert found.row("dense").parameters > found.row("trsp").parameters
    assert set(found.row("trsp").speed) == {"prefill", "decode"}
    assert set(found.row("trsp").kl) == set(events.DOMAINS)


def test_a_steered_run_counts_for_no_plan_and_is_run_again(plan_file, monkeypatch, capsys):
    file, ran = plan_file
    start = process.start

    def steered(run):
        config = run.config()
        steering.schedule(run, [turns.from_word("2:1:stage2_lr=1e-4")])
        model = (tiny.build(), tiny.tokenizer())
        recorder.record(
            run,
            steering.steered(run, config, lambda wheel: engine.execute(config, None, model, steering=wheel)),
        )
        return story.no_child(run)

    monkeypatch.setattr(process, "start", steered)
    assert shell_main.main(["compare", "--plan", str(file)]) == 3
    assert "steered while it ran, so it does not count" in capsys.readouterr().err
    (run,) = Store().runs()
    assert run.summary()["turns"][0]["name"] == "stage2_lr"
    plan = plans.read(str(file))
    assert plans.ends(plan, [run]) == plans.earlier_ends(plan, [run]) == {}
    monkeypatch.setattr(process, "start", start)
    monkeypatch.setattr("time.strftime", lambda *_: "20990101-000000")  # another second, another name
    assert shell_main.main(["compare", "--plan", str(file)]) == 0
    assert len(ran) == 2


def test_one_run_serves_all_variations_of_equal_settings_and_each_has_its_row(plan_file, tmp_path, capsys):
    file, ran = plan_file
    assert shell_main.main(["compare", "--plan", str(file)]) == 0
    document = json.loads(file.read_text())
    other = [VARIATIONS[0] | {"name": name, "title": name.upper()} for name in ("a", "b")]
    other += [VARIATIONS[1] | {"name": "c", "layers_of": "b"}]
    twin, out = tmp_path / "twin.json", tmp_path / "record.json"
    twin.write_text(json.dumps(document | {"name": "twin", "variations": other}))
    assert shell_main.main(["compare", "--plan", str(twin), "--out", str(out)]) == 0
    assert len(ran) == 2, "all that the second plan asks for has been run for the first"
    assert capsys.readouterr().err.count("already there") == 4
    record = plan_results.load(out)
    assert [row.title for row in record.rows[1:]] == ["A", "B", "c"]
    for row, title in zip(record.rows[1:3], ("A", "B"), strict=True):
        state = Store().get(ran[0]).state()
        assert row.title == title
        for domain in events.DOMAINS:
            figure = intervals.perplexity(row.losses[domain]).value
            assert figure == pytest.approx(state.perplexity["pruned"][domain], rel=1e-7), "as `list` shows it"
    plan = plans.read(str(twin))
    assert list(plans.ends(plan, Store().runs())) == ["a", "b", "c"]
    assert plans.earlier_ends(plan, Store().runs()) == {}


def test_the_plan_in_the_docs_runs(plan_file, tmp_path, capsys):
    section = (ROOT / "docs" / "cli.md").read_text("utf-8").split("## Plans")[1].split("\n## ")[0]
    document = json.loads(section.split("```json")[1].split("```")[0])
    assert plans.parse(document).title == "Does fading help?"
    document["base"] |= json.loads(plan_file[0].read_text())["base"]  # a tiny model and text
    file = tmp_path / "docs.json"
    file.write_text(json.dumps(document))
    assert shell_main.main(["compare", "--plan", str(file)]) == 0
    shown = capsys.readouterr().out
    assert [variation["title"] in shown for variation in document["variations"]] == [True] * 3
    assert "[" in shown


def test_a_run_that_fails_leaves_the_others_and_what_needed_it_out(plan_file, monkeypatch, capsys):
    file, _ = plan_file
    start = process.start

    def failing(run):
        if plans.belongs(run) == ("small", "control"):
            recorder.record(run, story.failing())
            return story.no_child(run)
        return start(run)

    monkeypatch.setattr(process, "start", failing)
    assert shell_main.main(["compare", "--plan", str(file)]) == 3
    said = capsys.readouterr()
    assert "1 of 3 runs did not finish" in said.err
    assert "Bring at least [384] tokens." in said.err
    assert "timed" in said.out


def test_a_run_that_did_not_finish_is_run_again(plan_file):
    file, ran = plan_file
    plan = plans.read(str(file))
    store = Store()
    half = plans.create(store, plan, plan.variations[0], plans.config_of(plan, plan.variations[0], {}))
    assert shell_main.main(["compare", "--plan", str(file)]) == 0
    assert half.id not in [run.id for run in store.runs()] or half.id in ran


def test_changed_settings_are_another_run(plan_file):
    file, _ = plan_file
    plan = plans.read(str(file))
    config = plans.config_of(plan, plan.variations[0], {})
    made = plans.create(Store(), plan, plan.variations[0], config)
    assert plans.belongs(made) == ("small", "trsp")
    assert plans.find(Store(), plan, plan.variations[0], config) == made
    assert plans.find(Store(), plan, plan.variations[0], dataclasses.replace(config, seed=1)) is None


@pytest.mark.parametrize("name", list(plans.built_in()))
def test_built_in_plans_can_be_read_and_share_seed_texts_and_measure(name):
    plan = plans.read(name)
    for variation in plan.variations:
        touched = {"seed", "text", "heldout", "measure_blocks", "measure_length", "model", "ratio"}
        assert not touched & set(variation.settings)


@pytest.mark.parametrize(
    "document",
    [
        [], {}, {"name": "a"}, {"name": "a", "variations": []}, {"name": "A b", "variations": [{"name": "x"}]},
        {"name": "a", "variations": [{"name": "x"}, {"name": "x"}]},
        {"name": "a", "variations": [{"name": "x", "layers_of": "y"}, {"name": "y"}]},
        {"name": "a", "variations": [{"name": "x", "settings": {"ratio": 3}}]},
        {"name": "a", "variations": [{"name": "x", "more": 1}]},
        {"name": "a", "base": {"unheard": 1}, "variations": [{"name": "x"}]},
        {"name": "a", "base": [], "variations": [{"name": "x"}]},
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused_with_a_remedy(document):
    with pytest.raises(TrspError) as caught:
        plans.parse(document)
    assert caught.value.remedy


def test_an_unknown_plan_names_those_there_are():
    with pytest.raises(TrspError, match="no plan") as caught:
        plans.read("nowhere")
    assert "ablation" in caught.value.remedy


def test_a_damaged_record_is_refused(tmp_path):
    for text in ("", "{}", "[]", '{"schema": 1}', '{"schema": 1, "rows": [{"x": 1}]}', '{"schema": 99}'):
        file = tmp_path / "record.json"
        file.write_text(text)
        with pytest.raises(TrspError):
            plan_results.load(file)


class TestIntervals:
    @given(st.lists(st.floats(0, 10), min_size=intervals.LEAST_BLOCKS, max_size=30))
    def test_the_interval_holds_the_mean_in_its_middle(self, losses):
        interval = intervals.mean(losses)
        assert interval.low <= interval.value <= interval.high
        assert interval.high - interval.value == pytest.approx(interval.value - interval.low, abs=1e-9)

    def test_it_is_students(self):
        """Student 1908, section 7: the additional hours of sleep of ten patients, t = 4.06 against none."""
        hours = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
        interval = intervals.mean(hours)
        reach = 2.2622 * statistics.stdev(hours) / math.sqrt(10)
        assert (interval.low, interval.high) == pytest.approx((1.58 - reach, 1.58 + reach), abs=1e-3)
        assert interval.value / ((interval.high - interval.value) / 2.2622) == pytest.approx(4.06, abs=0.01)

    def test_pairing_sees_what_the_spread_of_blocks_hides(self):
        other = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        one = [v - 0.1 for v in other]
        found = intervals.difference(one, other)
        assert found.value == pytest.approx(-0.1)
        assert found.sign == -1
        assert intervals.mean(one).high > intervals.mean(other).low
        assert intervals.factor(one, other).value == pytest.approx(math.exp(-0.1))

    def test_one_block_has_a_mean_and_no_interval(self):
        few = [1.0] * (intervals.LEAST_BLOCKS - 1)
        for interval in (intervals.mean(few), intervals.factor(few, few), intervals.points(few, few)):
            assert math.isfinite(interval.value)
            assert math.isnan(interval.low)
            assert interval.sign == 0
        perplexity = intervals.perplexity(few)
        assert records.with_interval(perplexity) == "2.7 [too few blocks]"

    @pytest.mark.parametrize("n_blocks", [5, 8, 12, 16, 24])
    def test_it_covers_the_truth_as_often_as_it_says(self, n_blocks):
        """Losses as they are spread: of a seed, and with the odd hard block."""
        import numpy as np

        draw = np.random.default_rng(n_blocks)
        for values in (draw.normal(1.0, 0.5, (4000, n_blocks)), 3 + draw.gumbel(0, 0.2, (4000, n_blocks))):
            truth = 1.0 if values.mean() < 2 else 3 + 0.2 * float(np.euler_gamma)
            hits = [one.low <= truth <= one.high for one in map(intervals.mean, values.tolist())]
            assert sum(hits) / len(hits) >= (0.94 if truth == 1.0 else 0.93)

    def test_points_agree_with_the_factor(self):
        one, other = [3.0, 3.2, 2.9, 3.1, 3.4], [3.1, 3.2, 3.1, 3.2, 3.4]
        points, factor = intervals.points(one, other), intervals.factor(one, other)
        assert points.value == pytest.approx(intervals.perplexity(one).value - intervals.perplexity(other).value)
        level = intervals.perplexity(other).value
        assert points.low / level == pytest.approx(factor.low - 1, abs=0.02)
        assert points.high / level == pytest.approx(factor.high - 1, abs=0.02)

    def test_wilson_by_its_published_values(self):
        """Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29."""
        for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                        (1, 29, 0.0061, 0.1718)):  # fmt: skip
            found = intervals.share(right, total)
            assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))

    def test_a_gain_in_the_calibration_domain_alone_is_called_so(self):
        level = [3.0, 3.1, 3.2, 3.3, 3.4, 3.5]
        base = {"calibration": level, "heldout": level}
        home = {"calibration": [v - 0.5 for v in level], "heldout": [3.2, 3.1, 3.3, 3.4, 3.5, 3.6]}
        both = {"calibration": home["calibration"], "heldout": home["calibration"]}
        assert intervals.only_at_home(home, base)
        assert not intervals.only_at_home(both, base)
        assert not intervals.only_at_home(base, base)

    def test_blocks_that_cannot_be_paired_are_refused(self):
        with pytest.raises(ValueError):
            intervals.difference([1.0], [1.0, 2.0])
        with pytest.raises(ValueError):
            intervals.mean([])
        with pytest.raises(ValueError):
            intervals.share(0, 0)
