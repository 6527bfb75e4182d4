"""Knobs and configs: every value comes back, and no input from outside raises anything but a `TrspError`."""

import contextlib
import json
import math
import shlex

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trsp_core.errors import TrspError
from trsp_core.pruning import validate
from trsp_core.schema import config, knobs
from trsp_core.schema.config import KNOBS, RunConfig

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def settings(draw):
    """A few knobs, each with a value that it allows."""
    chosen = {}
    for name in draw(st.lists(st.sampled_from(list(KNOBS)), unique=True, max_size=8)):
        knob = KNOBS[name]
        if knob.choices:
            chosen[name] = draw(st.sampled_from(knob.choices))
        elif knob.kind is bool:
            chosen[name] = draw(st.booleans())
        elif knob.kind is int:
            chosen[name] = draw(st.integers(int(knob.low or 0), int(knob.high or 10**6)))
        elif knob.kind is float:
            chosen[name] = draw(st.floats(knob.low, knob.high))
        else:
            chosen[name] = draw(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00")))
    return chosen


@given(settings())
def test_a_config_survives_json_and_the_command_line(chosen):
    try:
        made = validate.from_values(chosen)
    except TrspError:
        return  # values that contradict one another
    assert validate.from_json(config.to_json(made)) == made
    words = shlex.split(made.as_command())[4:]
    by_flag = {flag.lstrip("-").replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    assert validate.from_values(by_flag) == made


@example('{"schema": 1e999, "settings": {}}')
@example('{"schema": 1, "settings": [["ratio", 2]]}')
@given(st.text() | JSON.map(json.dumps) | JSON.map(lambda v: json.dumps({"schema": v, "settings": {}})))
def test_a_hostile_config_file_is_refused_and_nothing_else(text):
    with contextlib.suppress(TrspError):
        assert validate.from_json(text) == RunConfig()


@given(st.dictionaries(st.sampled_from(list(KNOBS)) | st.text(max_size=12), JSON, max_size=6))
def test_loose_values_give_a_config_within_bounds_or_a_refusal(values):
    try:
        made = validate.from_values(values)
    except TrspError:
        return
    for name, knob in KNOBS.items():
        value = getattr(made, name)
        assert type(value) is knob.kind
        assert knob.parse(value) == (value, None)


@pytest.mark.parametrize("name", list(KNOBS))
def test_every_default_is_allowed(name):
    assert KNOBS[name].parse(KNOBS[name].default) == (KNOBS[name].default, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan", "1e999", None, [], {}, True, "", "x"])
def test_what_is_no_number_is_no_number(value):
    _, problem = KNOBS["lambda_1"].parse(value)
    assert problem
    assert "--lambda-1" in problem.remedy


def test_numbers_are_read_from_text_and_whole_floats():
    assert KNOBS["stage2_steps"].parse("12") == (12, None)
    assert KNOBS["stage2_steps"].parse(12.0) == (12, None)
    assert KNOBS["stage2_steps"].parse(12.5)[1]
    assert KNOBS["one_shot"].parse("off") == (False, None)
    assert KNOBS["one_shot"].parse(1)[1]


def test_all_problems_are_told_at_once():
    with pytest.raises(TrspError) as caught:
        validate.from_values({"ratio": 2, "gate": "door", "seed": -1, "nonsense": 1}, "hasty")
    assert {p.knob for p in caught.value.problems} == {"ratio", "gate", "seed", "nonsense", "preset"}


def test_a_newer_schema_is_refused():
    with pytest.raises(TrspError, match="newer version"):
        validate.from_json(json.dumps({"schema": config.SCHEMA + 1, "settings": {}}))


@pytest.mark.parametrize("preset", list(config.PRESETS))
def test_presets_are_configs(preset):
    made = validate.from_values({}, preset)
    assert validate.check(made, n_layers=30, max_length=8192) == []
    assert made != RunConfig() or preset == "standard"


def test_a_flag_beats_the_preset():
    assert validate.from_values({"stage2_steps": 7}, "quick").stage2_steps == 7


@given(st.floats(0, 1), st.integers(1, 200))
def test_the_count_of_layers_is_the_papers(ratio, n_layers):
    count = config.layers_to_remove(ratio, n_layers)
    assert abs(count - ratio * n_layers) <= 0.5 + 1e-9
    assert 0 <= count <= n_layers


@given(st.sets(st.integers(0, 99), min_size=1))
def test_named_layers_come_back(layers):
    assert config.parse_layers(", ".join(map(str, layers))) == sorted(layers)


@given(st.text())
def test_any_text_names_layers_or_is_refused(text):
    with contextlib.suppress(TrspError):
        assert config.parse_layers(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 0}, "removes nothing"),
        ({"ratio": 1}, "removes everything"),
        ({"ratio": 0.01}, "rounds to none"),
        ({"ratio": 0.99}, "removes them all"),
        ({"protect_first": 15, "protect_last": 10}, "only 5 are sure"),
        ({"no_neighbours": True, "ratio": 0.5}, "no two neighbours"),
        ({"method": "manual"}, "needs the layers"),
        ({"method": "manual", "layers": "3,x"}, "expected numbers"),
        ({"method": "manual", "layers": "30"}, "does not exist"),
        ({"method": "manual", "layers": "0-29"}, "All 30"),
        ({"layers": "3"}, "Layers are given"),
        ({"probe_blocks": 30, "measure_blocks": 10}, "more than the 10"),
        ({"prompt": " "}, "prompt is empty"),
        ({"model": " "}, "nothing was given"),
        ({"block_length": 4096}, "at most 2048"),
    ],
)
def test_contradictions_are_found_before_anything_runs(changes, said):
    problems = validate.check(RunConfig(**changes), n_layers=30, max_length=2048)
    assert any(said in p.message for p in problems)
    assert all(p.remedy for p in problems)


def test_bounds_are_told_in_words():
    def bounds(**limits):
        return knobs.Knob("a", 1.0, "A", "", "first", **limits).bounds

    assert bounds() == "any value"
    assert bounds(low=1) == "at least 1"
    assert bounds(high=2, unit="s") == "at most 2 s"
    assert bounds(low=1, high=2) == "1 to 2"
