"""Text of strangers (names, prompts, titles, texts of events), made safe to show: a function for each medium.

A letter that steers instead of being seen (a terminal's escapes, marks that turn the direction of writing, what is
invisible) is spelled out, `\\x1b` or `\\u202e`, wherever it would be obeyed. The markup of HTML is escaped by the
template of `export.html_report`, that of pages by `pages.ui.style.words`.
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
    """`text` in one line, each letter of it visible: for cells, names, and whatever stands among our own words."""
    return _IN_A_LINE.sub(_spelled, str(text))


def lines(text: object) -> str:
    """The same with its newlines and tabs kept: for a terminal, and for text that stands by itself."""
    return _IN_LINES.sub(_spelled, str(text))


def json(values: Any, indent: int | None = None) -> str:
    """JSON that a terminal can be shown: equal to `values` when it is read, and nothing in it steers."""
    return written_json(standard_json.dumps(values, indent=indent, ensure_ascii=False, default=str))


def written_json(text: str) -> str:
    """The same of JSON that is text already."""
    return _IN_LINES.sub(_in_json, text)


def csv(value: Any) -> Any:
    """A cell of a CSV table: numbers as they are, an empty cell for what is none; text that a spreadsheet would compute
    begins with an apostrophe."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return line(f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text)


def markdown(text: object) -> str:
    """`text` in one line among Markdown, letter by letter: no markup, link, formula or cell of a table comes of it."""
    return _MARKS.sub(r"\\\1", _ADDRESSES.sub("\u2060", line(text)))


def fenced(text: object, language: str = "") -> str:
    """`text` as a code block of Markdown that nothing in it can close; its newlines are kept."""
    code = lines(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{fence}{language}\n{code}{'' if code.endswith(chr(10)) else chr(10)}{fence}"


def yaml(text: object) -> str:
    """`text` as a scalar of YAML, always a text: no key, comment, number or truth value comes of it."""
    return json(str(text))


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    short = {9: "\\t", 10: "\\n", 13: "\\r"}
    return short.get(code) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def _in_json(match: re.Match[str]) -> str:
    """As JSON spells it: in pairs of halves beyond the first 65,536."""
    return standard_json.dumps(match[0])[1:-1] if ord(match[0]) > 127 else f"\\u{ord(match[0]):04x}"
