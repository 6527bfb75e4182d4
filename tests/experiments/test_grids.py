"""Grids and sweeps: what a grid means, runs that are never run twice, failures that stay where they are, one record;
and the same figures from this machine and from a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import ROOT, story, tiny
from trsp_core.cli import main as shell_main
from trsp_core.errors import TrspError
from trsp_core.experiments import executors, grid_results, grids, plans, runner
from trsp_core.pruning import validate
from trsp_core.runs import recorder
from trsp_core.runs.store import Store
from trsp_core.schema import config
from trsp_core.schema.events import DOMAINS, TextPrepared

GRID = {
    "name": "small",
    "title": "A small grid",
    "base": {"ratio": 0.34, "stage1_steps": 5},
    "axes": {"stage2_steps": [10, 20], "seed": [0, 1]},
    "arms": [
        {"name": "choice", "settings": {"stage2_steps": 0}, "axes": ["seed"]},
        {"name": "trsp", "title": "TRSP", "layers_of": "choice"},
        {"name": "control", "title": "Delete first", "settings": {"control": "delete_first"}, "layers_of": "choice"},
    ],
}


def tell(seed):
    """The story, measured on blocks that the seed has drawn."""
    for event in story.tell():
        if isinstance(event, TextPrepared):
            for domain in DOMAINS:
                yield dataclasses.replace(event, domain=domain, fingerprint=f"{domain}-{seed}")
        else:
            yield event


class Told:
    """An executor that has the story of a run written at once, and remembers what it was asked for."""

    slots = 1

    def __init__(self, stop_after: int = 99, fails=lambda config: False):
        self.asked, self.over, self.stop_after, self.fails = [], [], stop_after, fails

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

    def refuse(self, config):
        pass

    def start(self, run):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(run.config())
        recorder.record(run, story.failing() if self.fails(run.config()) else tell(run.config().seed))
        self.over.append(run)

    def ended(self, seconds):
        over, self.over = self.over, []
        return over


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    return Store()


def work(store, workers, document=GRID):
    return list(runner.work(grids.parse(document).plan, store, workers))


AXES = {
    "lambda_1": st.sampled_from([0.0, 0.005, 0.05, 1]),
    "lambda_2": st.sampled_from([0, 1.0, 50]),
    "stage2_steps": st.sampled_from([1, 60, 600]),
    "seed": st.integers(0, 5),
    "one_shot": st.booleans(),
    "penalty": st.sampled_from(["l1", "l2"]),
}


@st.composite
def documents(draw):
    """Grids that are right, with arms that refer to arms before them."""
    names = draw(st.lists(st.sampled_from(list(AXES)), unique=True, max_size=3))
    axes = {name: draw(st.lists(AXES[name], min_size=1, max_size=3, unique_by=str)) for name in names}
    arms, spans = [], {}
    for n in range(draw(st.integers(0, 3))):
        span = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
        arm = {"name": f"arm{n}", "settings": draw(st.sampled_from([{}, {"control": "delete_first"}])), "axes": span}
        if not span or draw(st.booleans()):
            span = names
            del arm["axes"]
        before = [a for a, s in spans.items() if set(s) <= set(span)]
        if before and draw(st.booleans()):
            arm["layers_of"] = draw(st.sampled_from(before))
        spans[arm["name"]] = span
        arms.append(arm)
    return {"name": "g", "base": {"ratio": 0.3}, "axes": axes} | ({"arms": arms} if arms else {})


@given(documents())
def test_a_grid_is_the_product_of_its_axes_for_each_arm(document):
    grid = grids.parse(document)
    axes, arms = document["axes"], document.get("arms") or [{"name": "point"}]
    expected = []
    for arm in arms:
        span = arm.get("axes", list(axes))
        expected += [
            (arm["name"], dict(zip(span, v, strict=True))) for v in itertools.product(*(axes[a] for a in span))
        ]
    assert [(p.arm, p.at) for p in grid.points.values()] == expected
    assert [v.name for v in grid.plan.variations] == list(grid.points)
    for variation in grid.plan.variations:
        point = grid.points[variation.name]
        own = next(a.get("settings", {}) for a in arms if a["name"] == point.arm)
        assert variation.settings == {**point.at, **own}
        if variation.layers_of:
            theirs = grid.points[variation.layers_of]
            assert theirs.at.items() <= point.at.items()
            assert theirs.arm == next(a["layers_of"] for a in arms if a["name"] == point.arm)
    assert grids.parse(json.loads(json.dumps(document))) == grid


@given(documents(), st.integers(6, 9))
def test_a_longer_axis_leaves_the_points_there_are_alone(document, more):
    before = grids.parse(document)
    longer = {name: [*values, more] if name == "seed" else values for name, values in document["axes"].items()}
    after = grids.parse(document | {"axes": longer})
    assert {n: (p.arm, p.at) for n, p in before.points.items()}.items() <= {
        n: (p.arm, p.at) for n, p in after.points.items()
    }.items()


@given(st.recursive(st.none() | st.integers() | st.text(max_size=4), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["name", "axes", "arms", "base", "seed", "settings"]), x)))  # fmt: skip
def test_anything_else_is_refused_with_a_remedy(document):
    with contextlib.suppress(TrspError):
        grids.parse(document)


@pytest.mark.parametrize(
    "change",
    [
        {"axes": {"unheard": [1]}}, {"axes": {"seed": []}}, {"axes": {"seed": [0, 0]}}, {"axes": {"seed": 3}},
        {"axes": {"ratio": [3]}}, {"axes": {"seed": [[1]]}}, {"more": 1}, {"name": "A b"}, {"base": {"ratio": 3}},
        {"axes": {"seed": list(range(1001))}}, {"arms": [{"name": "x", "axes": ["lambda_1"]}]},
        {"arms": [{"name": "x"}, {"name": "x"}]}, {"arms": [{"name": "x", "layers_of": "y"}, {"name": "y"}]},
        {"arms": [{"name": "a"}, {"name": "b", "axes": ["seed"], "layers_of": "a"}]}, {"arms": [{"name": "x" * 17}]},
        {"arms": [{"name": "x", "unheard": 1}]}, {"arms": [{"title": "x"}]}, {"arms": "x"},
        {"arms": None}, {"arms": []}, {"base": []},
    ],
)  # fmt: skip
def test_what_is_no_grid_is_refused_with_a_remedy(change):
    with pytest.raises(TrspError) as caught:
        grids.parse(GRID | change)
    assert caught.value.remedy


def test_the_grid_in_the_docs_and_the_one_in_the_module_are_grids():
    blocks = re.findall(r"```json\n(.+?)```", (ROOT / "docs" / "cli.md").read_text("utf-8"), re.DOTALL)
    block, _ = [block for block in blocks if '"axes"' in block]  # the second is a study
    assert len(grids.parse(json.loads(block)).plan.variations) == 2 + 2 * 8
    stated = (grids.__doc__ or "").partition("\n\n")[2].partition("\n\nAn arm")[0]
    assert len(grids.parse(json.loads(stated)).plan.variations) == 2 + 2 * 4


def test_each_point_is_run_once_and_takes_over_its_layers(store):
    told = work(store, first := Told())
    assert len(first.asked) == 10
    assert [t.kind for t in told if t.number == 3] == ["begun", "finished"]
    later = [c for c in first.asked if c.stage2_steps]
    assert all((c.method, c.layers) == ("manual", "2,3") for c in later)
    assert len(store.runs()) == 10
    again = work(store, second := Told())
    assert second.asked == []
    assert [t.kind for t in again] == ["found"] * 10


def test_a_stopped_sweep_goes_on_where_it_was(store):
    with pytest.raises(KeyboardInterrupt):
        work(store, first := Told(stop_after=4))
    work(store, second := Told())
    assert len(first.asked) == 4
    assert len(second.asked) == 6
    assert not set(first.asked) & set(second.asked)


def test_a_point_that_another_process_finished_meanwhile_is_neither_deleted_nor_run_again(store):
    plan, made = grids.parse(GRID).plan, []

    class Raced(Told):
        def start(self, run):
            if not made:  # the next point is finished while this one runs
                settings = plans.config_of(plan, plan.variations[1], {})
                made.append(plans.create(store, plan, plan.variations[1], settings))
                recorder.record(made[0], tell(settings.seed))
            super().start(run)

    told = work(store, workers := Raced())
    assert made[0].config() not in workers.asked
    assert made[0].state().ended == "finished"
    assert [t.kind for t in told if t.number == 2][-1] == "finished"


def test_a_point_of_another_grid_with_the_same_settings_is_taken_from_there(store):
    work(store, Told())
    work(store, other := Told(), GRID | {"name": "other", "axes": {"stage2_steps": [10, 40], "seed": [0]}})
    assert sorted({c.stage2_steps for c in other.asked}) == [40]


def test_two_points_with_the_same_settings_are_one_run(store):
    same = GRID | {"arms": [{"name": "a"}, {"name": "b", "title": "The same"}]}
    told = work(store, workers := Told(), same)
    assert len(workers.asked) == 4
    assert [t.kind for t in told if t.number > 4] == ["found"] * 4


def test_a_run_is_found_again_after_the_program_has_learnt_a_setting(store):
    work(store, Told())
    for run in store.runs():
        file = run.folder / "config.json"
        kept = json.loads(file.read_text())
        del kept["settings"]["distil"]  # as an earlier version would have written it
        file.write_text(json.dumps(kept))
    work(store, again := Told())
    assert again.asked == []


def test_a_failed_point_is_told_and_the_others_go_on(store):
    bad = Told(fails=lambda c: c.seed == 1 and not c.stage2_steps)
    told = work(store, bad)
    ends = {t.variation.title: t.kind for t in told if t.kind != "begun"}
    assert ends["choice, seed 1"] == "failed"
    assert [w for t, w in ends.items() if "seed 1" in t and "choice" not in t] == ["left out"] * 4
    assert [w for t, w in ends.items() if "seed 0" in t] == ["finished"] * 5
    work(store, mended := Told())
    assert len(mended.asked) == 5, "what failed is run again, and what needed it"


@pytest.mark.parametrize("fails", [False, True])
def test_the_shell_reports_and_writes_one_small_record(store, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setattr(
        executors, "LocalExecutor", lambda: Told(fails=lambda c: fails and c.control != "none" and c.seed == 1)
    )
    file, out = tmp_path / "grid.json", tmp_path / "record.json"
    file.write_text(json.dumps(GRID))
    code = shell_main.main(["sweep", "--grid", str(file), "--out", str(out), "--json"])
    said = capsys.readouterr()
    assert code == (3 if fails else 0)
    assert "[ 3/10] TRSP, steps 10, seed 0: finished, perplexity 60.0 (calibration)" in said.err
    assert ("2 did not finish" in said.err) == fails
    assert ("my_file.txt" in said.err) == fails, "the reason is told"
    found = grid_results.load(out)
    assert json.loads(said.out)["name"] == "small"
    assert out.stat().st_size < 1500 * 10
    assert grid_results.load(grid_results.local(store.root) / "small.json") == found
    assert (found.planned, len(found.points)) == (10, 8 if fails else 10)
    choice, trsp = found.of("choice")[0], found.of("trsp")[0]
    assert choice.weights[3] == pytest.approx(0.25)
    assert len(choice.weights) == story.L
    assert trsp.at == {"stage2_steps": 10, "seed": 0}
    assert trsp.steps == 10
    assert trsp.gap == [0.9, 0.09]
    assert set(trsp.losses) == set(trsp.direct) == set(trsp.kl) == set(DOMAINS)
    assert "--layers 2,3" in found.command(trsp)
    assert validate.from_values(found.shared | trsp.settings).seed == 0


def test_results_are_shown_over_splits_without_running_anything(store, tmp_path, monkeypatch, capsys):
    work(store, Told(stop_after=99, fails=lambda c: c.control != "none" and c.stage2_steps == 20))
    monkeypatch.setattr(executors, "LocalExecutor", lambda: pytest.fail("nothing is to be run"))
    (tmp_path / "grid.json").write_text(json.dumps(GRID))
    words = ["sweep", "--grid", str(tmp_path / "grid.json"), "--results"]
    assert shell_main.main(words) == 0
    said = capsys.readouterr()
    assert "8 of 10 points are done, 2 are not." in said.err
    points, over_splits, spread = said.out.split("\n\n")
    assert points.count("\n") == 8
    assert "beside the control, equal steps" in over_splits
    assert "TRSP, steps 10" in over_splits
    assert "1.00 [1.00, 1.00]" in over_splits
    assert "agreement" in spread
    assert shell_main.main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == 8


def test_points_are_paired_by_the_blocks_they_were_measured_on(store):
    grid = grids.parse(GRID)
    done = {t.variation.name: (t.run, t.state) for t in runner.work(grid.plan, store, Told()) if t.kind == "finished"}
    found = grid_results.gather(grid, done)
    trsp, control = found.of("trsp"), found.of("control")
    one, other = grid_results.paired(trsp[:2], control[:2], "calibration")
    assert len(one) == len(other) == 2, "two splits, and not their sixteen blocks"
    assert len(grid_results.paired(trsp[:1], control[:1], "calibration")[0]) == 8
    assert grid_results.paired(trsp[:1], [c for c in control if c.seed == 1], "calibration") == ([], [])
    with pytest.raises(TrspError):
        grid_results.gather(grid, {})


def test_the_clock_learns_from_what_points_took(tiny_model):
    plan = grids.parse(GRID | {"base": GRID["base"] | {"model": str(tiny_model)}}).plan
    clock = runner.Clock(plan, 1)
    whole = clock.seconds_left()
    state = story.long_state(1, 5)
    names = [v.name for v in plan.variations]
    state.at = 10 * whole
    clock.learn(names[0], state)
    assert clock.gone(names[0]) > 5 * whole
    for name in names[1:]:
        assert clock.gone(name) is not None
    assert clock.seconds_left() == 0
    unknown = grids.parse(GRID | {"base": {"model": "nobody/nothing"}}).plan
    assert runner.Clock(unknown, 1).seconds_left() is None


def test_no_scheduler_is_refused_with_a_remedy():
    with pytest.raises(TrspError, match="No Dask scheduler"):
        executors.DaskExecutor("nonsense://nowhere")


# From here on the runs are real, on a tiny model, in processes of their own.


@pytest.fixture
def real(tmp_path, tiny_model):
    """A grid of three quick points, as a file."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(1200), "utf-8")
    base = {k: v if k == "save_model" else int(v) for k, v in story.SMALL.items()} | {"save_model": False, "threads": 1}
    base |= {"model": str(tiny_model), "text": str(text), "heldout": str(text), "ratio": 0.4}
    base |= {"speed_repeats": 0, "sample_tokens": 0, "importance_blocks": 0, "kl_blocks": 1}
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(GRID | {"base": base, "axes": {"stage2_steps": [3], "seed": [0]}}))
    return file


def sweeping(runs, *words):
    environment = {**os.environ, "TRSP_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trsp_core", "sweep", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_cluster_of_two_workers_gives_the_same_figures(real, tmp_path):
    distributed = pytest.importorskip("distributed")
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        words = ("--grid", real, "--scheduler", cluster.scheduler_address)
        with sweeping(tmp_path / "there", *words, "--out", there) as child:
            assert child.wait(timeout=1200) == 0, child.stderr.read()
        with sweeping(tmp_path / "there", *words) as child:
            assert child.wait(timeout=1200) == 0
            assert child.stderr.read().count("already there") == 3
    with sweeping(tmp_path / "here", "--grid", real, "--out", here) as child:
        assert child.wait(timeout=1200) == 0
    one, other = grid_results.load(here), grid_results.load(there)
    assert len(one.points) == 3
    for a, b in zip(one.points, other.points, strict=True):
        assert (a.losses, a.removed, a.weights, a.gap) == (b.losses, b.removed, b.weights, b.gap)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "cluster"])
def test_ctrl_c_stops_in_writing_and_the_next_sweep_goes_on(real, tmp_path, where):
    long = json.loads(real.read_text())
    long["base"]["probe_blocks"] = 0
    long["axes"]["stage2_steps"] = [50_000, 60_000]
    real.write_text(json.dumps(long))
    with contextlib.ExitStack() as opened:
        words = ["--grid", real]
        if where == "cluster":
            distributed = pytest.importorskip("distributed")
            cluster = distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
            )
            words += ["--scheduler", opened.enter_context(cluster).scheduler_address]
        store = Store(tmp_path / "runs")
        child = opened.enter_context(sweeping(store.root, *words))
        end = time.monotonic() + 900
        while sum(len(run.state().gap_steps) > 3 for run in store.runs()) < (2 if where == "cluster" else 1):
            assert time.monotonic() < end
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=300) == 130
        by = [run.status() for run in store.runs()]
        assert by.count("finished") == 1
        assert by.count("cancelled") == (3 if where == "cluster" else 1), "two at work, and one that waited"
        assert not any(run.held() for run in store.runs())
    stopped = {run.id for run in store.runs() if run.status() == "cancelled"}
    with sweeping(tmp_path / "runs", "--grid", real) as child:
        end = time.monotonic() + 900
        while not any(run.state().reopened is not None and run.held() for run in store.runs()):
            assert time.monotonic() < end
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=300) == 130
        assert child.stderr.read().count("already there") == 1, "the choice had finished"
    assert stopped <= {run.id for run in store.runs()}, "what was stopped goes on in its own folder"
    short = json.loads(real.read_text())
    short["axes"]["stage2_steps"] = [3]
    real.write_text(json.dumps(short))
    with sweeping(tmp_path / "runs", "--grid", real) as child:
        assert child.wait(timeout=1200) == 0
        assert child.stderr.read().count("already there") == 1


def test_plans_and_grids_name_runs_alike(store):
    plan = grids.parse(GRID).plan
    run = plans.create(store, plan, plan.variations[2], config.RunConfig())
    assert plans.belongs(run) == ("small", plan.variations[2].name)
