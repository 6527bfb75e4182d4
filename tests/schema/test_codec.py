"""One codec for all that is written as JSON: what comes back is equal, and of the type that its field declares."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pages.ui.tour.lessons import Step
from trsp_core import paths
from trsp_core.experiments import grid_results, plan_results, plans
from trsp_core.schema import codec, events, messages, run_state
from trsp_core.schema.config import RunConfig

NUMBER = st.integers(-(2**53), 2**53)
CLASSES: list[type] = [
    *events.KINDS.values(), *messages.RECORDS.values(), messages.Variant, RunConfig, run_state.Summary,
    plan_results.Record, grid_results.Sweep, plans.Plan, Step,
]  # fmt: skip


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values that a field of type `kind` may hold in memory, among them what is not a number."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.none() | values_of(next(part for part in parts if part is not types.NoneType))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{f.name: values_of(hints[f.name]) for f in dataclasses.fields(kind)})
    if origin is list:
        return st.lists(values_of(parts[0]), max_size=3)
    if origin is tuple:
        return st.lists(values_of(parts[0]), max_size=3).map(tuple)
    if origin in (dict, Mapping):
        return st.dictionaries(st.text(max_size=4), values_of(parts[1]), max_size=3)
    anything = st.none() | st.booleans() | NUMBER | st.text(max_size=4) | st.lists(st.text(max_size=4), max_size=2)
    plain = {int: NUMBER, str: st.text(max_size=8), bool: st.booleans(), float: st.floats(), Any: anything}
    return plain[kind]


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type `kind`, all the way down."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Any:
        return True
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return isinstance(value, kind) and all(
            fits(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(kind)
        )
    if origin in (list, tuple):
        return isinstance(value, origin) and all(fits(entry, parts[0]) for entry in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(entry, parts[1]) for entry in value.values())
    return type(value) is kind


def read_back(value: Any, kind: Any = Any) -> Any:
    """What `value` is expected to be once it has been through JSON."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        part = next(part for part in parts if part is not types.NoneType)
        return (
            None
            if value is None or not math.isfinite(value if isinstance(value, float) else 0)
            else read_back(value, part)
        )
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{f.name: read_back(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(kind)})
    if origin in (list, tuple):
        return origin(read_back(entry, parts[0]) for entry in value)
    if origin in (dict, Mapping):
        return {key: read_back(entry, parts[1]) for key, entry in value.items()}
    return math.nan if isinstance(value, float) and not math.isfinite(value) else value


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_what_is_read_has_the_type_that_is_declared_and_is_equal(kind, data):
    record = data.draw(values_of(kind))
    text = codec.encode(record)
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    back = codec.decode(text, kind)
    assert fits(back, kind)
    assert back == read_back(record, kind)  # lists and dataclasses hold the one `math.nan` to be equal to itself
    assert codec.encode(back) == text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (events.Progressed, text)
        for text in ("", "[]", "3", "null", '"a"', "{}", "[" * 100_000, '{"done": "3"}', '{"done": true}',
                     '{"done": 1.0}', '{"done": null}', '{"done": 1, "more": 2}', f'{{"done": {2**63}}}')
    ]
    + [
        (events.Noted, '{"message": "\\ud800"}'), (events.LayersChosen, '{"method": "a", "layers": [null]}'),
        (events.DeletionProbed, '{"step": 1, "perplexity": 1e999, "blocks": 1, "tokens": 1}'),
        (events.DeletionProbed, '{"step": 1, "perplexity": NaN, "blocks": 1, "tokens": 1}'),
        (messages.Importance, '{"model": {"unheard": 1}}'), (messages.Importance, '{"model": "a"}'),
        (plans.Plan, '{"name": "a", "variations": {}}'), (run_state.Summary, "{}"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(kind, text):
    with pytest.raises(ValueError):
        codec.decode(text, kind)


def holds(new, old):
    """Whether `new` says all that `old` says; records of this version have fields that older ones lack."""
    if isinstance(old, dict):
        return all(name in new and holds(new[name], value) for name, value in old.items())
    if isinstance(old, list):
        return len(new) == len(old) and all(map(holds, new, old))
    return new == old


def test_what_ships_is_read_and_written_as_it_was():
    for file in (paths.ASSETS / "evidence").glob("*.json"):
        record = json.loads(file.read_text("utf-8"))
        assert json.loads(plan_results.to_json(plan_results.load(file))) == record, file.name
    for file in (paths.ASSETS / "evidence" / "sweeps").glob("*.json"):
        record = json.loads(file.read_text("utf-8"))
        assert holds(json.loads(grid_results.to_json(grid_results.load(file))), record), file.name
    for file in paths.ASSETS.glob("*/events.jsonl"):
        for line in file.read_text("utf-8").splitlines():
            number, at, event = events.from_line(line)
            body = {k: v for k, v in json.loads(line).items() if k != "crc"}
            again = {k: v for k, v in json.loads(events.to_line(event, number, at)).items() if k != "crc"}
            assert again == body | {k: v for k, v in again.items() if k not in body}
