"""A run that breaks off anywhere goes on to the end that it would have had, and what it has told is never rewritten."""

import itertools
import operator
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from trsp_core.errors import TrspError
from trsp_core.pruning import engine, validate
from trsp_core.pruning.transfers import refit
from trsp_core.training import checkpointing
from trsp_core.runs import recorder, resume, worker
from trsp_core.runs.store import Store
from trsp_core.schema import events, run_state

pytestmark = pytest.mark.usefixtures("unproved")
TINY = tiny.SETTINGS | {"model": "tiny", "importance_blocks": 1, "kl_blocks": 2, "stage2_steps": 5, "save_model": True}
OFTEN = 1e-9  # minutes


class Killed(BaseException):
    """As if the process had gone: nothing is written any more."""


@pytest.fixture(autouse=True)
def _a_point_at_every_step(monkeypatch):
    monkeypatch.setattr(checkpointing, "PATIENCE", 0.0)


def config_of(text, **settings):
    return validate.from_values({**TINY, "text": text, "heldout": text, **settings})


def go(run, stop=None, step=None):
    """Execute `run` from where it is; killed after `stop` events, or after a step of stage 2."""
    seen = itertools.count(1)

    def watch(folded, event):
        if next(seen) == stop or (isinstance(event, events.StageTwoStepped) and event.step == step):
            raise Killed

    story = engine.execute(run.config(), run.folder, (tiny.build(), tiny.tokenizer()), resume.find(run))
    return recorder.record(run, story, watch)


def told(run):
    """All that counts of a run, but for times and the plan's seconds."""
    return [events.stable(e) for _, _, e in run.state().lines]


def weights(run):
    return load_file(run.model_folder / "model.safetensors")


CASES = {
    "usual": {"resume_minutes": OFTEN},
    "no points kept": {"resume_minutes": 0},
    "distilled, faded out": {"resume_minutes": OFTEN, "distil": 0.5, "anneal": 0.5},
    "cycles": {"resume_minutes": OFTEN, "cycles": 2},
    "adapters in cycles": {"resume_minutes": OFTEN, "cycles": 2, "adapter_rank": 2},
    "delete first": {"resume_minutes": OFTEN, "control": "delete_first"},
    "rounds that go on": {"resume_minutes": OFTEN, "stage1_stretch": 3, "stage1_average": 2},
    "W learns in stage 1": {"resume_minutes": OFTEN, "learn_weights": True},
    "no stage 2": {"stage2_steps": 0, "method": "shortgpt"},
    "merged layers": {"resume_minutes": OFTEN, "method": "laco", "control": "delete_first"},
    "refit, then trained": {"resume_minutes": OFTEN, "transfer": "refit"},
    "kept weights, then trained": {"resume_minutes": OFTEN, "transfer": "kept_weights"},
    "kept weights, nothing trained": {"transfer": "kept_weights", "stage2_steps": 0, "resume_minutes": 0},
    "refit alone": {"transfer": "refit", "stage2_steps": 0},
    "rebuild": {"transfer": "rebuild", "stage2_steps": 0},
    "refit, then adapters": {"resume_minutes": OFTEN, "transfer": "refit", "adapter_rank": 2},
    "narrow": {"method": "width", "stage2_steps": 0},
}


def ends_the_same(case, text, tmp_path, stops, same=operator.eq):
    """Interrupt a run after each of `stops` (shares of all events), resume it, and hold it against a whole one: what
    each told, and the numbers that it learnt, are the `same`."""
    store, config = Store(tmp_path), config_of(text, **CASES[case])
    whole = store.create(config)
    go(whole)
    expected, learnt = told(whole), weights(whole)
    assert whole.status() == "finished"
    for stop in sorted({max(1, int(share * (len(expected) - 1))) for share in stops}):
        run = store.create(config)
        with pytest.raises(Killed):
            go(run, stop)
        assert run.status() == "lost"
        before = run.events_file.read_bytes()
        resume.reopen(run)
        go(run)
        assert run.events_file.read_bytes().startswith(before)
        assert run.status() == "finished", f"after event {stop}: {run.state().failure}"
        assert same(told(run), expected), f"after event {stop}"
        numbers = {name: value.tolist() for name, value in weights(run).items()}
        assert same(numbers, {name: value.tolist() for name, value in learnt.items()}), f"after event {stop}"
        assert not run.checkpoint_file.exists()
        assert not list(run.folder.glob(".*"))
        store.delete(run.id)


def test_an_interrupted_run_ends_the_same(text, tmp_path):
    ends_the_same("usual", text, tmp_path, (0.1, 0.55, 0.7, 0.95))


def repair_cut(run, layers):
    """The number of events up to that of the last of so many repaired layers."""
    refits = [n for n, _, e in run.state().lines if isinstance(e, events.LayerRefitted)]
    return refits[layers - 1] + 1


@pytest.mark.parametrize("steps", [0, 3])
def test_a_repair_goes_on_behind_the_layers_that_it_has_solved(steps, text, tmp_path, monkeypatch):
    """Killed right after a layer, and between its event and the next: no layer is solved twice, and the run ends as it
    would have."""
    solves, plain = [], refit.solved
    monkeypatch.setattr(refit, "solved", lambda *args: solves.append(1) or plain(*args))
    settings = {"transfer": "refit", "stage2_steps": steps, "calibration_blocks": 48, "probe_blocks": 1}
    store, config = Store(tmp_path), config_of(text, **settings)
    whole = store.create(config)
    go(whole)
    layers = len(whole.state().repair_layers)
    assert len(whole.state().repair_probes) == 4
    each, repaired = len(solves) // layers, len(whole.state().refits)
    assert (each, repaired, layers) == (2, 3, 3)
    for stop in (repair_cut(whole, 1), repair_cut(whole, 2), repair_cut(whole, 2) + 1, repair_cut(whole, 3) + 3):
        solves.clear()
        run = store.create(config)
        with pytest.raises(Killed):
            go(run, stop)
        before = len(run.state().refits)
        assert len(solves) == each * before
        past = resume.reopen(run)
        complete = stop > repair_cut(whole, 3)
        assert past.refits == (0 if complete else before)
        if not complete:
            assert f"It goes on behind {before} layer" in resume.outlook(run)
        go(run)
        assert len(solves) == each * layers, "a layer was solved twice"
        assert run.status() == "finished"
        assert told(run) == told(whole)
        assert all(torch.equal(a, weights(run)[name]) for name, a in weights(whole).items())
        assert not run.points


@pytest.mark.parametrize("damage", ["a bit", "cut short", "of another shape", "gone"])
def test_a_solution_that_cannot_be_used_is_found_again(damage, text, tmp_path):
    store, config = Store(tmp_path), config_of(text, transfer="refit", stage2_steps=0)
    whole, run = store.create(config), store.create(config)
    go(whole)
    with pytest.raises(Killed):
        go(run, repair_cut(whole, 2))
    first, *others = run.solution_files
    content = first.read_bytes()
    if damage == "gone":
        for file in others:
            file.unlink()
    elif damage == "of another shape":
        solve = checkpointing.Solutions(run, config).remembered(lambda *args: torch.zeros(2, 3))
        solve(torch.nn.Linear(2, 3), [torch.zeros(1, 1, 2)], [torch.zeros(1, 1, 3)], [])
        assert first.read_bytes() != content
    else:
        first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "a bit" else content[:40])
    assert resume.reopen(run).refits == (1 if damage == "gone" else 2)
    go(run)
    assert told(run) == told(whole)
    assert all(torch.equal(a, weights(run)[name]) for name, a in weights(whole).items())


def test_with_no_points_kept_a_repair_starts_over(text, tmp_path):
    store, config = Store(tmp_path), config_of(text, transfer="refit", stage2_steps=0, resume_minutes=0)
    whole, run = store.create(config), store.create(config)
    go(whole)
    with pytest.raises(Killed):
        go(run, repair_cut(whole, 2))
    assert run.solution_files == []
    assert "at the beginning of the repair; computed again: 2 layers" in resume.outlook(run)
    assert resume.reopen(run).refits == 0
    go(run)
    assert told(run) == told(whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interrupted_anywhere_it_ends_the_same(case, text, tmp_path):
    ends_the_same(
        case, text, tmp_path, [n / 300 for n in range(1, 301)] if case == "usual" else [n / 9 for n in range(10)]
    )


def test_what_the_chart_shows_has_no_step_twice(text, tmp_path):
    run = Store(tmp_path).create(config_of(text, resume_minutes=0))
    for step in (3, 4, None):  # twice in stage 2
        if run.state().count:
            resume.reopen(run)
        try:
            go(run, step=step)
        except Killed:
            folded = run.state()
    assert folded.count > len(folded.lines)
    folded = run.state()
    assert [s.step for s in folded.gap_steps] == [1, 2, 3, 4, 5]
    assert [s.step for s in folded.weight_steps] == [1, 2, 3, 4]
    assert [p.step for p in folded.probes] == [0, 2, 4, 5]
    assert folded.notes.count(run_state.RESUMED) == 1
    lines = run.read()[0]
    assert [n for n, _, _ in lines] == list(range(len(lines)))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(lines))


def test_a_look_at_new_lines_alone_folds_to_the_same(text, tmp_path):
    """As pages do it: a live look must not differ from reading all anew."""
    run = Store(tmp_path).create(config_of(text, resume_minutes=OFTEN))
    with pytest.raises(Killed):
        go(run, step=4)
    lines, offset = run.read()
    folded = run_state.fold(run_state.RunState(), lines)
    resume.reopen(run)
    go(run)
    assert vars(run_state.fold(folded, run.read(offset)[0])) == vars(run.state())


def test_a_torn_last_line_is_ended_and_left_out(text, tmp_path):
    run = Store(tmp_path).create(config_of(text))
    with pytest.raises(Killed):
        go(run, 12)
    whole = run.events_file.read_bytes()
    run.events_file.write_bytes(whole[:-9])
    resume.reopen(run)
    assert run.events_file.read_bytes().startswith(whole[:-9] + b"\n")
    go(run)
    assert run.status() == "finished"


def test_what_has_finished_or_is_at_work_is_not_resumed(text, tmp_path):
    run = Store(tmp_path).create(config_of(text))
    with run.hold(), pytest.raises(TrspError, match="running already"):
        resume.reopen(run)
    go(run)
    before = run.events_file.read_bytes()
    run.checkpoint_file.touch()  # as of a run that was killed right after it had finished
    with pytest.raises(TrspError, match="nothing left"):
        resume.reopen(run)
    assert run.events_file.read_bytes() == before
    assert not run.checkpoint_file.exists()


def test_a_file_of_another_model_is_told_and_then_done_without(text, tmp_path):
    run = Store(tmp_path).create(config_of(text, resume_minutes=OFTEN))
    with pytest.raises(Killed):
        go(run, step=4)
    save_file(
        {"weight/other": torch.zeros(1)}, run.checkpoint_file, {"step": str(resume.saved_step(run.checkpoint_file))}
    )
    resume.reopen(run)
    go(run)
    assert "did not fit this model" in run.state().failure.message
    assert not run.checkpoint_file.exists()
    resume.reopen(run)
    go(run)
    assert run.status() == "finished"


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_one_wrong_bit_of_what_it_resumes_from_is_noticed(share, stage, text, tmp_path):
    """In the metadata (the step or round, so that all else fits) or in the numbers."""
    whole, run = (Store(tmp_path).create(config_of(text, ratio=0.6, resume_minutes=OFTEN)) for _ in range(2))
    go(whole)
    with pytest.raises(Killed):
        go(
            run, next(n for n, _, e in whole.read()[0] if isinstance(e, events.LayerChosen) and e.round == 2) + 2
        ) if stage == 1 else go(run, step=4)
    file = run.rounds_file if stage == 1 else run.checkpoint_file
    content = bytearray(file.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    name = b'"round":"' if stage == 1 else b'"step":"'
    at = head + int(share * (len(content) - head - 1)) if share else content.index(name) + len(name)
    content[at] ^= 1
    file.write_bytes(content)
    resume.reopen(run)
    go(run)
    if run.status() == "failed":
        assert "was damaged. It is deleted." in run.state().failure.message
        assert "starts over" in run.state().failure.remedy
        assert not file.exists()
        resume.reopen(run)
        go(run)
    else:
        assert not share, "the step that it names was not told, so it is of no use"
    assert run.status() == "finished"
    assert told(run) == told(whole)
    assert all(torch.equal(a, weights(run)[name]) for name, a in weights(whole).items())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_damaged_point_is_done_without_before_the_run_goes_on(stage, text, tmp_path):
    whole, run = (Store(tmp_path).create(config_of(text, ratio=0.6, resume_minutes=OFTEN)) for _ in range(2))
    go(whole)
    second = next(n for n, _, e in whole.read()[0] if isinstance(e, events.LayerChosen) and e.round == 2)
    with pytest.raises(Killed):
        go(run, second + 2) if stage == 1 else go(run, step=4)
    past = resume.reopen(run)
    assert checkpointing.without_damage(past) == ""
    file = past.rounds if stage == 1 else past.checkpoint
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    sentence = checkpointing.without_damage(past)
    assert file.name in sentence
    assert not file.exists()
    assert resume.reopen(run, anew=True).next_event < past.next_event
    go(run)
    assert run.status() == "finished"
    assert told(run) == told(whole)
    assert all(torch.equal(a, weights(run)[name]) for name, a in weights(whole).items())


def test_the_process_of_a_run_does_without_a_damaged_point_and_says_so(text, tmp_path, tiny_model):
    """What was told before the stage that starts over is told once."""
    whole, run = (
        Store(tmp_path).create(config_of(text, model=str(tiny_model), resume_minutes=OFTEN, save_model=False))
        for _ in range(2)
    )
    assert worker.drive(whole).ended == "finished"
    with pytest.raises(Killed):
        go(run, step=4)
    past = resume.reopen(run)
    content = bytearray(past.checkpoint.read_bytes())
    content[-1] ^= 1
    past.checkpoint.write_bytes(content)
    ended = worker.drive(run)
    assert ended.ended == "finished"
    assert any("resume.safetensors in the run folder was damaged" in note for note in ended.notes)
    kinds = [[e.name for _, _, e in r.state().lines if isinstance(e, events.PhaseStarted)] for r in (whole, run)]
    assert kinds[0] == kinds[1]


def test_a_file_that_is_cut_short_is_done_without(text, tmp_path):
    run = Store(tmp_path).create(config_of(text, resume_minutes=OFTEN))
    with pytest.raises(Killed):
        go(run, step=4)
    run.checkpoint_file.write_bytes(b"cut short")
    resume.reopen(run)
    go(run)
    assert run.status() == "finished"


def test_no_room_for_a_point_is_told_and_stops_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda path: type("Disk", (), {"free": 1000})())
    run = Store(tmp_path).create(config_of(text, resume_minutes=OFTEN))
    go(run)
    assert run.status() == "finished"
    assert run.state().notes.count(checkpointing.NO_ROOM) == 1


def test_a_stopped_run_goes_on_without_the_files_of_its_ending(text, tmp_path):
    run = Store(tmp_path).create(config_of(text, resume_minutes=OFTEN))
    story = engine.execute(run.config(), run.folder, (tiny.build(), tiny.tokenizer()))
    recorder.record(run, story, lambda folded, _: run.cancel() if len(folded.gap_steps) == 3 else None)
    assert (run.status(), run.summary()["ended"]) == ("cancelled", "cancelled")
    assert resume.can(run.state(), run.status())
    assert resume.reopen(run).step == 2
    assert (run.status(), run.cancelled(), run.summary()["ended"]) == ("lost", False, "")
    go(run)
    assert run.summary()["ended"] == "finished"


def test_a_folder_that_cannot_be_written_is_told_and_nothing_is_changed(text, tmp_path):
    """A folder in the place of a file stands for a right that is missing: it stops the super-user as well."""
    run = Store(tmp_path).create(config_of(text))
    with pytest.raises(Killed):
        go(run, 12)
    before = run.events_file.read_bytes()
    (run.folder / "lock").unlink()
    (run.folder / "lock").mkdir()
    with pytest.raises(TrspError, match="cannot be written") as refused:
        resume.reopen(run)
    assert refused.value.remedy
    (run.folder / "cancel").mkdir()
    with pytest.raises(TrspError, match="cannot be written"):
        run.cancel()
    assert run.events_file.read_bytes() == before


@pytest.mark.parametrize("content", ['{"schema": 99, "settings": {}}', '{"schema": 1, "settings": {"ratio": 7}}', "{"])
def test_a_run_with_a_newer_or_damaged_config_is_not_resumed(content, text, tmp_path):
    run = Store(tmp_path).create(config_of(text))
    with pytest.raises(Killed):
        go(run, 12)
    before = run.events_file.read_bytes()
    (run.folder / "config.json").write_text(content)
    with pytest.raises(TrspError):
        resume.reopen(run)
    assert run.events_file.read_bytes() == before


@pytest.mark.parametrize("jump", [-(10.0**9), 10.0**9])
def test_a_clock_that_jumps_moves_no_time_of_a_run(jump, text, tmp_path, monkeypatch):
    run, clock = Store(tmp_path).create(config_of(text, stage2_steps=0)), time.time
    with pytest.raises(Killed):
        go(run, 12)
    monkeypatch.setattr(time, "time", lambda: clock() + jump)
    resume.reopen(run)
    go(run)
    times = [at for _, at, _ in run.read()[0]]
    assert times == sorted(times)
    assert times[-1] < 600
    assert run.status() == "finished"
