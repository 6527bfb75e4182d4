"""Makes strangers' text (names, prompts, titles, texts of events) safe to show: a function for each medium.

Some characters steer instead of being seen: a terminal's escapes, marks that turn the direction of writing, invisible
ones. They are spelled out, as `\\x1b` or `\\u202e`. Two media are not escaped here: HTML (by the template of
`export.html_report`) and pages (by `pages.ui.style.words`).
"""

from __future__ import annotations

import json as standard_json
import math
import re
from typing import Any

# Controls of ASCII and of Latin 1; marks of direction; separators of lines and paragraphs that are no newline; what has
# no width and joins no letters; halves of letters, which no encoding can hold; tags, an alphabet that nothing shows.
_STEERING = (
    "\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
    "\\ud800-\\udfff\\U000e0000-\\U000e007f"
)
_IN_A_LINE = re.compile(f"[{_STEERING}]")
_IN_LINES = re.compile(f"(?![\\t\\n])[{_STEERING}]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # what a spreadsheet would compute
_MARKS = re.compile(r"([\\`*<|~$&]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:]))")
_ADDRESSES = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)


def line(text: object) -> str:
    """`text` in one line, with every steering character, newline and tab spelled out: for cells, names, and whatever
    stands among our own words."""
    return _IN_A_LINE.sub(_spelled, str(text))


def lines(text: object) -> str:
    """As `line`, but newlines and tabs stay as they are: for a terminal, and for text that stands by itself."""
    return _IN_LINES.sub(_spelled, str(text))


def json(values: Any, indent: int | None = None) -> str:
    """`values` as JSON that is safe on a terminal: steering characters are written as JSON's escapes, so that whoever
    parses it gets equal values. What JSON has no form for is written as `str` gives it."""
    return written_json(standard_json.dumps(values, indent=indent, ensure_ascii=False, default=str))


def written_json(text: str) -> str:
    """JSON text, made safe on a terminal as `json` does, without parsing it."""
    return _IN_LINES.sub(_in_json, text)


def csv(value: Any) -> Any:
    """`value` as a cell of a CSV table. Numbers stay; None, infinity and not-a-number give None, an empty cell. Text is
    put in one line, and gets an apostrophe in front where a spreadsheet would take it for a formula."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return line(f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text)


def markdown(text: object) -> str:
    """`text` in one line for Markdown, escaped so that it shows letter by letter and becomes no markup, no link, no
    formula and no further cell of a table."""
    return _MARKS.sub(r"\\\1", _ADDRESSES.sub("\u2060", line(text)))


def fenced(text: object, language: str = "") -> str:
    """`text` as a Markdown code block, with a fence that is longer than any in `text`; newlines and tabs stay."""
    code = lines(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{fence}{language}\n{code}{'' if code.endswith(chr(10)) else chr(10)}{fence}"


def yaml(text: object) -> str:
    """`text` as a quoted YAML string, so that it becomes no key, comment, number or truth value."""
    return json(str(text))


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    short = {9: "\\t", 10: "\\n", 13: "\\r"}
    return short.get(code) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def _in_json(match: re.Match[str]) -> str:
    """The character as JSON escapes it: `\\uXXXX`, and two of these (a surrogate pair) beyond U+FFFF."""
    return standard_json.dumps(match[0])[1:-1] if ord(match[0]) > 127 else f"\\u{ord(match[0]):04x}"
