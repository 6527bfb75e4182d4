"""How quantities look to people: in one place, and as this table says."""

import ast
import math
import re
from pathlib import Path

import pytest

from trsp_core import formatting
from trsp_core.formatting import NOT_A_NUMBER

ROOT = Path(__file__).resolve().parent.parent
OF_NUMBERS = re.compile(r"[,%]|\.\d|[eEfFgG]$")
NO_QUANTITIES = {"escaping.py": "numbers of letters", "events.py": "checksums", "formatting.py": "the place itself"}


def files() -> list[Path]:
    return [ROOT / "app.py", *(ROOT / "pages").rglob("*.py"), *(ROOT / "trsp_core").rglob("*.py")]


def spec(node: ast.FormattedValue) -> str:
    """The format of one value in an f-string; what is put in at run time counts as "0"."""
    parts = node.format_spec.values if isinstance(node.format_spec, ast.JoinedStr) else []
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in parts)


def test_numbers_are_formatted_in_one_place():
    places = [
        f"{file.relative_to(ROOT)}:{node.lineno} {spec(node)}"
        for file in files()
        if file.name not in NO_QUANTITIES
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FormattedValue) and OF_NUMBERS.search(spec(node))
    ]
    assert places == [], "call a function of trsp_core.formatting"


def test_charts_and_tables_in_the_browser_take_their_patterns_from_there():
    places = [
        f"{file.relative_to(ROOT)}:{keyword.value.lineno}"
        for file in files()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "format" and isinstance(keyword.value, ast.Constant)
    ]
    assert places == [], "use a pattern of trsp_core.formatting"


@pytest.mark.parametrize(
    ("shown", "value", "text"),
    [
        (formatting.perplexity, 41.72, "41.7"), (formatting.perplexity, 1240.3, "1,240"),
        (formatting.perplexity, 20_000, "20,000"), (formatting.perplexity, 288_298, "288,000"),
        (formatting.perplexity, 169_950, "170,000"), (formatting.perplexity, 999_900, "1 million"),
        (formatting.perplexity, 7.9e8, "790 million"), (formatting.perplexity, 3.2e14, "320 trillion"),
        (formatting.perplexity, 1e43, "10^43"), (formatting.perplexity, 10_449, "10,400"),
        (formatting.perplexity, None, NOT_A_NUMBER), (formatting.perplexity, math.inf, NOT_A_NUMBER),
        (formatting.ratio, 0.957, "0.96"), (formatting.ratio, 2.408, "2.41"), (formatting.ratio, 34.52, "34.5"),
        (formatting.ratio, 10602.59, "10,600"), (formatting.ratio, math.nan, NOT_A_NUMBER),
        (formatting.nats, 1.314, "1.31"), (formatting.nats, -0.0312, "-0.031"), (formatting.nats, 0.0, "0.00"),
        (formatting.nats, math.nan, NOT_A_NUMBER), (formatting.weight, 0.7412, "0.74"),
        (formatting.margin, 0.0123, "0.012"), (formatting.margin, 1e-5, "less than 0.001"),
        (formatting.figure, 0.000312, "0.000312"), (formatting.points, 1.24, "1.2"),
        (formatting.signed_points, -0.44, "−0.4"),
        (formatting.percent, 0.184, "18\u00a0%"), (formatting.percent, 0.0251, "2.5\u00a0%"),
        (formatting.percent, 0.0999, "10\u00a0%"), (formatting.percent, 0.0, "0\u00a0%"),
        (formatting.signed_percent, -0.23, "−23\u00a0%"), (formatting.count, 20_000, "20,000"),
        (formatting.parameters, 134_515_008, "134.5 million"), (formatting.parameters, 1.24e9, "1.24 billion"),
        (formatting.parameters, 512, "512"), (formatting.parameters, None, ""),
        (formatting.size, 540e6, "540 MB"), (formatting.size, 1.24e9, "1.2 GB"), (formatting.size, 12, "12 bytes"),
        (formatting.rate, 1163.2, "1,163"), (formatting.rate, 18.46, "18.5"),
        (formatting.seconds, 0.42, "0.42 s"), (formatting.seconds, 3.21, "3.2 s"), (formatting.seconds, 40.2, "40 s"),
        (formatting.duration, 202, "3 min 20 s"), (formatting.duration, 7500, "2 h 5 min"),
        (formatting.clock, 92, "1:32"), (formatting.clock, 3725, "1:02:05"), (formatting.progress, 0.42, " 42%"),
        (formatting.setting, 1e-5, "1e-05"), (formatting.setting, 20_000.0, "20000"),
    ],
)  # fmt: skip
def test_each_kind_of_figure_has_one_look(shown, value, text):
    assert shown(value) == text


def test_an_interval_is_shown_as_its_figure_is():
    assert formatting.interval(61.23, 58.0, 64.9, formatting.perplexity) == "61.2 [58.0, 64.9]"
