"""Events: lines that come back equal, lines that are refused, and a fold that takes them in any order."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trsp_core.cli import arguments
from trsp_core.errors import TrspError
from trsp_core.schema import codec, events, run_state
from trsp_core.schema.run_state import RunState

NUMBER = st.floats(allow_nan=False, allow_infinity=False)
VALUES = {
    "str": st.text(),
    "int": st.integers(-(2**53), 2**53),
    "float": NUMBER,
    "float | None": st.none() | NUMBER,
    "int | None": st.none() | st.integers(-(2**53), 2**53),
    "list[int]": st.lists(st.integers(0, 99), max_size=4),
    "list[float]": st.lists(NUMBER, max_size=4),
    "list[float | None]": st.lists(st.none() | NUMBER, max_size=4),
    "list[dict[str, Any]]": st.lists(st.fixed_dictionaries({"name": st.text(), "seconds": st.floats(0, 1e6)})),
}


@st.composite
def any_event(draw):
    kind = draw(st.sampled_from(list(events.KINDS.values())))
    fields = {f.name: draw(VALUES[str(f.type)]) for f in dataclasses.fields(kind)}
    return kind(**fields)


@given(any_event(), st.integers(0, 10**9), st.floats(0, 1e6))
def test_a_line_comes_back_equal(event, n, at):
    line = events.to_line(event, n, at)
    assert "\n" not in line
    assert events.from_line(line) == (n, round(at, 3), event)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_becomes_null_and_comes_back(value):
    line = events.to_line(events.DeletionProbed(1, value, 2, 3), 0, 0.0)
    assert json.loads(line)["perplexity"] is None
    assert events.from_line(line)[2].perplexity is None


@given(st.text() | any_event().map(lambda e: events.to_line(e, 0, 0.0)), st.data())
def test_damaged_lines_are_refused_and_nothing_else(line, data):
    torn = line[: data.draw(st.integers(0, max(len(line) - 1, 0)))]
    with pytest.raises(TrspError):
        events.from_line(torn)


@pytest.mark.parametrize(
    "line",
    [
        "{}", "[]", "3", "null", '"a"', "[" * 100_000,
        '{"n": 0, "at": 0, "event": "Unheard"}',
        '{"n": 0, "at": 0, "event": []}',
        '{"n": 0, "at": 0, "event": "Progressed"}',
        '{"n": 0, "at": 0, "event": "Progressed", "done": "3"}',
        '{"n": 0, "at": 0, "event": "Progressed", "done": true}',
        '{"n": 0, "at": 0, "event": "Progressed", "done": 1, "more": 2}',
        '{"n": 0, "at": 0, "event": "LayersChosen", "method": "a", "layers": 3}',
        '{"n": 0, "at": 0, "event": "LayersChosen", "method": "a", "layers": [null]}',
        '{"n": 1e999, "at": 0, "event": "Progressed", "done": 1}',
    ],
)  # fmt: skip
def test_a_line_that_does_not_fit_is_refused(line):
    with pytest.raises(TrspError):
        events.from_line(line)


@given(st.lists(any_event(), max_size=12))
def test_a_fold_takes_events_in_any_order(many):
    folded = run_state.fold(RunState(), [(n, float(n), event) for n, event in enumerate(many)])
    assert folded.count == len(many)
    assert 0 <= folded.fraction <= 1
    json.dumps(codec.plain(run_state.summary(folded)))
    assert arguments.progress(folded)
    assert arguments.account({"run": "x", **run_state.summary(folded)})


@given(st.lists(any_event(), max_size=12), st.data())
def test_a_fold_in_parts_is_a_fold_of_the_whole(many, data):
    lines = [(n, float(n), event) for n, event in enumerate(many)]
    cut = data.draw(st.integers(0, len(lines)))
    assert run_state.fold(run_state.fold(RunState(), lines[:cut]), lines[cut:]) == run_state.fold(RunState(), lines)


def test_a_plan_from_elsewhere_cannot_break_the_fold():
    line = (
        '{"n":0,"at":0,"event":"RunPlanned","phases":[{"x":1},{"name":"a","seconds":"b"},{"name":"c"}],"peak_bytes":1}'
    )
    folded = run_state.fold(RunState(), [events.from_line(line)])
    assert folded.fraction == 0.0
    assert folded.seconds_left is None


def test_time_left_follows_the_plan_and_the_pace():
    plan = events.RunPlanned([{"name": "a", "seconds": 10.0}, {"name": "b", "seconds": 30.0}], 0)
    folded = run_state.fold(RunState(), [(0, 0.0, plan), (1, 0.0, events.PhaseStarted("a", 10))])
    assert folded.seconds_left == 40.0
    run_state.fold(folded, [(2, 16.0, events.Progressed(8))])
    assert folded.fraction == pytest.approx(0.2)
    assert folded.seconds_left == pytest.approx(64.0)  # twice as slow as planned
    run_state.fold(folded, [(3, 20.0, events.RunCancelled("a"))])
    assert folded.seconds_left is None


def test_measured_times_are_the_only_fields_that_may_differ():
    one = events.SpeedMeasured("dense", 1, 2, 3, 4.0, [4.0, 4.0], 5.0, [5.0, 5.0])
    assert events.stable(one) == events.stable(dataclasses.replace(one, prefill=9.0, decode_range=[1.0, 2.0]))
    assert events.stable(one) != events.stable(dataclasses.replace(one, state="pruned"))
