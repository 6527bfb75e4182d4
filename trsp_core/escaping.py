"""What strangers wrote (names, prompts, titles, texts of events), on its way out: a function for each place it goes to.

A letter that steers instead of being seen (a terminal's escapes, marks that turn the direction of writing, what is
invisible) is spelled out, `\\x1b` or `\\u202e`, wherever it would be obeyed. Pages have
`pages.ui.style.words` beside this.
"""

from __future__ import annotations

import html as markup
import json as standard_json
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
_MARKS = re.compile(r"([\\`*<|~$&]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))")
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


def html(text: object) -> str:
    """`text` for HTML, in an element or in an attribute."""
    return markup.escape(lines(text), quote=True)


def csv(value: Any) -> Any:
    """A cell of a CSV table: numbers as they are; text that a spreadsheet would compute begins with an apostrophe."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return line(f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text)


def markdown(text: object) -> str:
    """`text` in one line among Markdown, letter by letter: no markup, link, formula or cell of a table comes of it."""
    return _MARKS.sub(r"\\\1", _ADDRESSES.sub("\u2060", line(text)))


def fenced(text: object, language: str = "") -> str:
    """`text` as a code block of Markdown that nothing in it can close; its newlines are kept."""
    shown = lines(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", shown)), default=0))
    return f"{fence}{language}\n{shown}{'' if shown.endswith(chr(10)) else chr(10)}{fence}"


def yaml(text: object) -> str:
    """`text` as a scalar of YAML, always a text: no key, comment, number or truth value comes of it."""
    return json(str(text))


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    known = {9: "\\t", 10: "\\n", 13: "\\r"}
    return known.get(code) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def _in_json(found: re.Match[str]) -> str:
    """As JSON spells it: in pairs of halves beyond the first 65,536."""
    return standard_json.dumps(found[0])[1:-1] if ord(found[0]) > 127 else f"\\u{ord(found[0]):04x}"
