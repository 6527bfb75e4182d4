"""A run that is steered while it runs: what is turned is taken at the next step, told, kept, and taken again by a run
that broke off."""

import itertools
import json

import pytest
from safetensors.torch import load_file

from tests import tiny
from trsp_core.errors import TrspError
from trsp_core.pruning import engine, validate
from trsp_core.runs import limits, recorder, resume, steering
from trsp_core.runs.store import Store
from trsp_core.schema import events, turns
from trsp_core.schema.events import KnobTurned, LayerChosen, Noted, StageOneStepped, StageTwoStepped
from trsp_core.schema.turns import Turn
from trsp_core.training import checkpointing

pytestmark = pytest.mark.usefixtures("unproved")
LEAN = {"speed_repeats": 0, "importance_blocks": 0, "kl_blocks": 0, "sample_tokens": 0, "measure_blocks": 2}
OFTEN = 1e-9  # minutes


class Killed(BaseException):
    """As if the process had gone: nothing is written any more."""


@pytest.fixture
def begin(text, tmp_path):
    """A function that makes a new run."""

    def new(**settings):
        values = {
            **tiny.SETTINGS,
            "model": "tiny",
            "text": text,
            "heldout": text,
            "stage2_steps": 6,
            "save_model": True,
        }
        return Store(tmp_path).create(validate.from_values({**values, **LEAN, **settings}))

    return new


def go(run, at=None, kill=None, bounds=None):
    """Execute `run` from where it is, as its process does.

    Args:
        at: what happens after a step: `at[stage, step](run)`.
        kill: the (stage, step) after which the process is gone.
    """

    def watch(state, event):
        if isinstance(event, StageOneStepped | StageTwoStepped):
            here = (1 if isinstance(event, StageOneStepped) else 2, event.step)
            if here == kill:
                raise Killed
            if at and here in at:
                at[here](run)

    config, past = run.config(), resume.find(run)
    loaded = (tiny.build(), tiny.tokenizer())

    def story(wheel):
        return engine.execute(config, run.folder, loaded, past, steering=wheel)

    return recorder.record(run, steering.steered(run, config, story, bounds), watch)


def asks(*wanted):
    return lambda run: steering.ask(run, [Turn(*turn) for turn in wanted])


def told(run):
    return [events.stable(event) for _, _, event in run.state().lines]


def weights(run):
    return {name: value.tolist() for name, value in load_file(run.model_folder / "model.safetensors").items()}


def test_a_run_that_nobody_steers_tells_what_it_told_before(begin):
    run, plain = begin(), begin()
    go(run)
    recorder.record(plain, engine.execute(plain.config(), plain.folder, (tiny.build(), tiny.tokenizer())))
    assert told(run) == told(plain)
    assert weights(run) == weights(plain)


def test_a_knob_is_taken_at_the_next_step(begin):
    run, plain = begin(), begin()
    go(plain)
    state = go(run, {(1, 2): asks(("lambda_1", 2.0)), (2, 3): asks(("lambda_2", 500.0), ("stage2_lr", 5e-3))})
    assert state.ended == "finished"
    assert state.turns == [
        KnobTurned(1, 2, "lambda_1", 0.05, 2.0, 1),
        KnobTurned(2, 3, "lambda_2", 10.0, 500.0, 2),
        KnobTurned(2, 3, "stage2_lr", 1e-3, 5e-3, 3),
    ]
    before = plain.state()
    assert state.weight_steps[:2] == before.weight_steps[:2]
    assert state.weight_steps[2] != before.weight_steps[2]
    assert [step.lambda_2 for step in state.gap_steps] == pytest.approx(
        [10 / 6, 20 / 6, 5, 500 * 4 / 6, 500 * 5 / 6, 500]
    )
    assert [step.learning_rate for step in state.gap_steps] == pytest.approx([1e-3] * 3 + [5e-3] * 3)
    numbers = [event for _, _, event in state.lines]
    assert isinstance(numbers[numbers.index(state.turns[0]) - 1], StageOneStepped)


def test_fewer_and_more_steps_and_layers(begin):
    state = go(begin(), {(1, 1): asks(("stage1_steps", 3), ("ratio", 0.6)), (2, 2): asks(("stage2_steps", 9))})
    assert len(state.chosen) == 3
    assert [step.step for step in state.weight_steps] == list(range(1, 10))
    assert [step.step for step in state.gap_steps] == list(range(1, 10))
    assert [probe.step for probe in state.probes] == [0, 2, 4, 6, 8, 9]
    state = go(begin(), {(1, 3): asks(("ratio", 0.2)), (2, 3): asks(("stage2_steps", 4))})
    assert len(state.chosen) == 1  # it was chosen already, so stage 1 ends
    assert len(state.weight_steps) == 3
    assert len(state.gap_steps) == 4


def test_a_stage_is_ended(begin):
    state = go(begin(stage1_steps=4), {(1, 2): asks(("end_stage",)), (2, 3): asks(("end_stage",))})
    assert state.ended == "finished"
    assert len(state.weight_steps) == 2
    assert len(state.chosen) == 2
    assert [step.step for step in state.gap_steps] == [1, 2, 3]
    assert state.probes[-1].step == 3
    assert [turns.ends_stage(turn) for turn in state.turns] == [True, True]
    by_weight = sorted(range(tiny.L), key=lambda i: abs(state.weight_steps[-1].weights[i]))
    assert state.chosen[0] == by_weight[0]


@pytest.mark.parametrize("kill", [(1, 3), (1, 5), (2, 3), (2, 5), (2, 7)])
def test_a_steered_run_that_was_killed_ends_the_same(begin, kill, monkeypatch):
    monkeypatch.setattr(checkpointing, "PATIENCE", 0.0)
    at = {
        (1, 1): asks(("stage1_steps", 3)),
        (1, 4): asks(("lambda_1", 2.0), ("ratio", 0.6)),
        (2, 2): asks(("lambda_2", 500.0)),
        (2, 4): asks(("stage2_steps", 8), ("stage2_lr", 2e-3)),
    }
    whole, run = begin(resume_minutes=OFTEN), begin(resume_minutes=OFTEN)
    go(whole, at)
    with pytest.raises(Killed):
        go(run, at, kill)
    resume.reopen(run)
    go(run, {step: turn for step, turn in at.items() if step > kill})
    assert run.status() == "finished", run.state().failure
    assert told(run) == told(whole)
    assert weights(run) == weights(whole)


def test_what_was_lost_is_turned_again_without_points_to_resume_from(begin):
    at = {(1, 3): asks(("lambda_1", 2.0)), (2, 2): asks(("lambda_2", 500.0)), (2, 4): asks(("stage2_steps", 5))}
    whole, run = begin(resume_minutes=0), begin(resume_minutes=0)
    go(whole, at)
    for kill in ((1, 4), (2, 5)):
        with pytest.raises(Killed):
            go(run, at if kill[0] == 1 else {step: turn for step, turn in at.items() if step[0] == 2}, kill)
        resume.reopen(run)
    go(run)
    assert told(run) == told(whole)
    assert weights(run) == weights(whole)


def test_its_command_repeats_it(begin):
    run, again = begin(), begin()
    go(run, {(1, 3): asks(("lambda_1", 2.0)), (2, 2): asks(("lambda_2", 500.0), ("end_stage",))})
    words = turns.command(run.config(), run.state().turns).split(" --steer ")[1:]
    assert words == ["1:3:lambda_1=2.0", "2:2:lambda_2=500.0", "2:2:stage2_steps=2"]
    steering.schedule(again, [turns.from_word(word) for word in words])
    go(again)
    assert told(again) == told(run)
    assert weights(again) == weights(run)


def test_pause_one_step_and_go(begin, monkeypatch):
    """While it is paused nothing happens but what is asked for."""
    run, plain, looks = begin(), begin(), []
    go(plain)
    script = [("step",), ("lambda_1", 0.06), ("lambda_1", 0.05), ("step",), ("go",)]

    def sleep(seconds):
        looks.append(len(run.state().weight_steps))
        if len(looks) % 2:
            steering.ask(run, [Turn(*script.pop(0))])

    monkeypatch.setattr(steering.time, "sleep", sleep)
    state = go(run, {(1, 1): asks(("pause",))})
    assert state.ended == "finished"
    assert not state.paused
    assert script == []
    assert looks == [1, 2, 2, 2, 2, 2, 2, 3, 3][: len(looks)]
    assert [t.name for t in state.turns] == ["lambda_1", "lambda_1"]
    assert [step.weights for step in state.weight_steps] == [step.weights for step in plain.state().weight_steps]
    assert weights(run) == weights(plain)


def test_time_in_a_pause_is_no_time_of_a_phase():
    from trsp_core.schema.run_state import RunState, fold

    story = [
        (0.0, events.RunPlanned([{"name": "choose", "seconds": 10.0}, {"name": "transfer", "seconds": 30.0}], 0)),
        (0.0, events.PhaseStarted("choose", 10)),
        (5.0, events.Progressed(5)),
        (5.0, KnobTurned(1, 0, "pause", 0, 1)),
        (905.0, KnobTurned(1, 0, "pause", 1, 0)),
    ]
    state = fold(RunState(), [(n, at, event) for n, (at, event) in enumerate(story)])
    assert state.seconds_left == pytest.approx(35.0)
    fold(state, [(5, 905.0, KnobTurned(1, 0, "stage2_steps", 60, 20)), (6, 910.0, events.PhaseStarted("transfer", 20))])
    assert state.phase_seconds["choose"] == pytest.approx(10.0)
    assert state.seconds_left == pytest.approx(10.0)
    fold(
        state,
        [(7, 912.0, StageTwoStepped(1, 3.0, 0.0, 0.0, 0.0, [])), (8, 912.0, KnobTurned(2, 1, "stage2_steps", 20, 5))],
    )
    assert state.units == 5


BAD = [
    b"garbage", b"{}", b"[1]", b"\xff\xfe", b'{"name": "seed", "value": 3}', b'{"name": "lambda_1", "value": 1e9}',
    b'{"name": "lambda_1", "value": "1"}', b'{"name": "lambda_1", "value": null}', b'{"name": "pause", "stage": 1}',
    b'{"name": "stage1_steps", "value": 2.5}', b"x" * 5000, b'{"name": "ratio", "value": 1.0}', b"[" * 200,
]  # fmt: skip


def test_lines_that_are_no_turns_are_refused_and_nothing_else_happens(begin):
    run, plain = begin(), begin()
    go(plain)
    (run.folder / "steer.jsonl").write_bytes(b"\n".join(BAD) + b"\ntorn")
    state = go(run)
    notes = [event for _, _, event in state.lines if isinstance(event, Noted) and "not turned" in event.message]
    assert len(notes) == steering.MOST_REFUSALS
    assert notes[-1].message.endswith("Further ones are not noted.")
    assert not state.turns
    assert [e for e in told(run) if e not in [events.stable(n) for n in notes]] == told(plain)


def test_a_torn_line_does_not_spoil_the_next(begin):
    run = begin()
    (run.folder / "steer.jsonl").write_bytes(b'{"name": "lam')
    state = go(run, {(1, 1): asks(("lambda_1", 2.0))})
    assert [turn.name for turn in state.turns] == ["lambda_1"]


REFUSED = {
    "unknown": (Turn("seed", 3), {}, "cannot be turned"),
    "out of bounds": (Turn("lambda_1", -1.0), {}, "0 to 100"),
    "another method": (Turn("lambda_1", 0.1), {"method": "random"}, "learns no layer weights"),
    "no stage 2": (Turn("lambda_2", 1.0), {"stage2_steps": 0}, "no steps"),
    "no penalty": (Turn("lambda_2", 1.0), {"control": "delete_first"}, "without a penalty"),
    "cycles": (Turn("stage2_steps", 9), {"cycles": 2}, "several cycles"),
    "another rate": (Turn("adapter_lr", 1e-3), {}, "not the rate"),
    "too many layers": (Turn("ratio", 0.8), {"protect_first": 2}, "sure to be free"),
    "no steps": (Turn("stage2_steps", 0), {}, "cannot end after 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_do_nothing_is_refused_before_it_is_asked(begin, case):
    turn, settings, why = REFUSED[case]
    run, refusals = begin(**settings), []

    def try_it(state, event):
        if isinstance(event, LayerChosen | events.LayersChosen) and not refusals:
            with pytest.raises(TrspError, match=why) as refusal:
                steering.ask(run, [turn])
            refusals.append(refusal)
            raise KeyboardInterrupt

    story = engine.execute(run.config(), run.folder, (tiny.build(), tiny.tokenizer()))
    recorder.record(run, story, try_it)
    assert refusals
    assert not (run.folder / "steer.jsonl").exists()


def test_only_a_run_that_runs_is_steered(begin):
    with pytest.raises(TrspError, match="not running"):
        steering.ask(begin(), [Turn("lambda_1", 0.1)])


def test_in_a_demo_it_is_bounded_like_everything_else(begin, monkeypatch):
    """Steps beyond a demo's are refused by who asks and by the run's own process, and a pause ends by itself."""
    run, clock = begin(), itertools.count(0, 30.0)
    monkeypatch.setattr(steering.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(steering.time, "sleep", lambda seconds: None)
    bounds = limits.DEMO

    def beyond(run):
        with pytest.raises(TrspError, match="a demo allows 240"):
            steering.ask(run, [Turn("stage2_steps", 500)], bounds=bounds)
        with (run.folder / "steer.jsonl").open("a") as file:
            file.write(json.dumps({"name": "stage2_steps", "value": 500}) + "\n")
        steering.ask(run, [Turn("pause")], bounds=bounds)

    settings = {"model": "smollm2-135m", "text": "wikipedia", "heldout": "news"}
    monkeypatch.setattr(type(run), "config", lambda self: validate.from_values({**tiny.SETTINGS, **LEAN, **settings}))
    story = [events.PhaseStarted("choose", 4), StageOneStepped(1, 1, 3.0, 5.0, [1.0] * 5), events.RunFinished(0)]

    def watch(state, event):
        if isinstance(event, StageOneStepped):
            beyond(run)

    state = recorder.record(run, steering.steered(run, run.config(), lambda wheel: (e for e in story), bounds), watch)
    assert any("a demo allows 240" in note for note in state.notes)
    assert any("a pause of 3 minutes" in note for note in state.notes)
    assert not state.paused
    assert not state.turns


def test_a_paused_run_can_be_stopped(begin, monkeypatch):
    run = begin()
    monkeypatch.setattr(steering.time, "sleep", lambda seconds: run.cancel())
    assert go(run, {(1, 1): asks(("pause",))}).ended == "cancelled"
    resume.reopen(run)
    assert not run.state().paused
    assert go(run).ended == "finished"
