"""Lessons: steps through the pages that a teacher writes as a JSON file, read and checked here. Imports no torch.

    {"title": "Which layers matter?", "minutes": 10,
     "steps": [{"title": "A first run", "text": "Press Start, and watch the weights sink.", "page": "run",
                "settings": {"ratio": 0.1}, "look_at": "the layer weights"},
               {"title": "What it writes now", "text": "Press Write.", "page": "compare", "prompt": "The city was"}]}

`settings` are knobs that differ from the preset Two-stage. All texts are plain words: a page shows them letter by
letter, so that a lesson from a stranger cannot bring links or pictures along.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from trsp_core import formatting, paths
from trsp_core.errors import Problem, TrspError
from trsp_core.pruning import validate
from trsp_core.schema import codec
from trsp_core.schema.config import KNOBS, PRESETS

PAGES = ("home", "run", "layers", "compare", "evidence", "runs", "paper")
MOST_STEPS = 30
MOST_MINUTES = 600
MOST_LETTERS = {"title": 80, "text": 1200, "prompt": 2000, "look_at": 300}
MOST_BYTES = 100_000  # of a file
MOST_IN_LINK = 6_000  # letters; browsers and proxies take about 8,000 for a whole address
PACKED = "1."  # in front of a lesson that the link itself holds; no shipped lesson's name has a dot
_SHIPPED = re.compile(r"[a-z0-9-]{1,40}")
_EXAMPLE = "A short example stands at the top of pages/ui/tour/lessons.py, whole ones in assets/lessons."


@dataclass(frozen=True)
class Step:
    """One thing to do on one page.

    Attributes:
        page: one of `PAGES`.
        settings: knob to value, each allowed: what differs from an untouched form.
        prompt: for Compare; "" leaves its prompt alone.
        look_at: what to look at, in a few words; "" where the text says it.
    """

    title: str
    text: str
    page: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = ""
    look_at: str = ""

    def form(self) -> dict[str, Any]:
        """Every knob as this step wants it."""
        return {name: knob.default for name, knob in KNOBS.items()} | PRESETS["two-stage"] | dict(self.settings)


@dataclass(frozen=True)
class Lesson:
    """Steps in their order, and about how many minutes they take."""

    title: str
    minutes: float
    steps: tuple[Step, ...]


def parse(document: Any) -> Lesson:
    """A lesson from decoded JSON.

    Raises:
        TrspError: with a `Problem` for every fault, named for its step and field.
    """
    problems: list[Problem] = []
    if not isinstance(document, dict):
        raise TrspError(
            f"A lesson is a JSON object with title, minutes and steps; {_kind(document)} was given.", _EXAMPLE
        )
    reader = _Reader(document, "", problems)
    title, minutes, documents = reader.text("title"), reader.minutes(), reader.steps()
    reader.nothing_but(("title", "minutes", "steps"))
    steps = tuple(_step(step, f"Step {n}, ", problems) for n, step in enumerate(documents, 1))
    if problems:
        count = "One thing" if len(problems) == 1 else f"{len(problems)} things"
        raise TrspError(
            f"{count} in this lesson cannot be used: " + " ".join(p.message for p in problems),
            " ".join(dict.fromkeys(p.remedy for p in problems)),
            problems,
        )
    return Lesson(title, minutes, steps)


def _step(document: Any, where: str, problems: list[Problem]) -> Step:
    if not isinstance(document, dict):
        problems.append(
            Problem(
                where.rstrip(", "),
                f"{where.rstrip(', ')}: {_kind(document)} was given, expected an object.",
                "Give each step a title, a text and a page.",
            )
        )
        return Step("", "", "home")
    reader = _Reader(document, where, problems)
    step = Step(
        title=reader.text("title"),
        text=reader.text("text"),
        page=reader.page(),
        settings=reader.settings(),
        prompt=reader.text("prompt", needed=False),
        look_at=reader.text("look_at", needed=False),
    )
    reader.nothing_but(tuple(f.name for f in dataclasses.fields(Step)))
    return step


@dataclass
class _Reader:
    """Fields of one object, read one by one; what is wrong with them is gathered, not raised."""

    document: Mapping[Any, Any]
    where: str
    problems: list[Problem]

    def wrong(self, name: str, message: str, remedy: str) -> None:
        where = f"{self.where}{name}"
        self.problems.append(Problem(where, f"{where[:1].upper()}{where[1:]}: {message}", remedy))

    def text(self, name: str, needed: bool = True) -> str:
        value, most = self.document.get(name, ""), MOST_LETTERS[name]
        if not isinstance(value, str) or not _writable(value):
            self.wrong(name, f"{_kind(value)} was given, expected a text.", f"Write {name} in quotes.")
        elif needed and not value.strip():
            self.wrong(name, "nothing was given.", f"Write a {name} of at most {most} letters.")
        elif len(value) > most:
            self.wrong(
                name,
                f"{formatting.count(len(value))} letters are too many.",
                f"Write at most {formatting.count(most)} letters into {name}.",
            )
        else:
            return value.strip() if needed else value
        return ""

    def minutes(self) -> float:
        value = self.document.get("minutes")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.wrong("minutes", f"{_kind(value)} was given, expected a number.", "Give minutes as a number.")
        elif not 0 < value <= MOST_MINUTES:  # nor is what is no number
            self.wrong(
                "minutes", f"{_quoted(value)} is out of range.", f"Give above 0 and up to {MOST_MINUTES} minutes."
            )
        else:
            return value
        return 0

    def steps(self) -> list[Any]:
        value = self.document.get("steps")
        if not isinstance(value, list) or not value:
            self.wrong("steps", f"{_kind(value)} was given, expected a list of steps.", "Write at least one step.")
        elif len(value) > MOST_STEPS:
            self.wrong(
                "steps",
                f"{formatting.count(len(value))} are too many.",
                f"Write at most {MOST_STEPS} steps, or two lessons.",
            )
        else:
            return value
        return []

    def page(self) -> str:
        value = self.document.get("page")
        if value in PAGES:
            return str(value)
        self.wrong("page", f"{_quoted(value)} was given.", f"Name one of the pages {', '.join(PAGES)}.")
        return "home"

    def settings(self) -> dict[str, Any]:
        """Each value checked by its knob, and then all of them beside the preset Two-stage."""
        values = self.document.get("settings", {})
        if not isinstance(values, dict):
            self.wrong("settings", f"{_kind(values)} was given, expected knobs and values.", 'Write {"ratio": 0.2}.')
            return {}
        try:
            config = validate.from_values(values, "two-stage")
        except TrspError as error:
            for problem in error.problems:
                self.wrong(f"settings, {problem.knob}", problem.message, problem.remedy)
            return {}
        return {name: getattr(config, name) for name in values}

    def nothing_but(self, names: tuple[str, ...]) -> None:
        for name in self.document:
            if name not in names:
                self.wrong(
                    _quoted(name), "there is no such field.", f"Leave it out; the fields are {', '.join(names)}."
                )


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {dict: "an object", list: "a list", bool: "true or false", str: "a text"}.get(type(value), _quoted(value))


def _quoted(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and not _writable(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _writable(text: str) -> bool:
    """Whether it can be written as UTF-8 and shown: half of a surrogate pair cannot, a null neither."""
    return "\x00" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def load(text: str | bytes) -> Lesson:
    """A lesson from a file's content.

    Raises:
        TrspError: too long, no UTF-8, no JSON, or no lesson.
    """
    if len(text) > MOST_BYTES:
        raise TrspError(
            f"A lesson of {formatting.count(len(text))} bytes is too long.",
            f"Keep it under {formatting.count(MOST_BYTES)} bytes.",
        )
    try:
        document = json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TrspError("This file is no UTF-8 text.", "Save the lesson as a UTF-8 JSON file.") from error
    except json.JSONDecodeError as error:
        what = f"{error.msg} in line {error.lineno}, column {error.colno}"
        raise TrspError(f"This lesson is no JSON: {what}.", "Mend that line, and load it again.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets as deep
        raise TrspError("This lesson is no JSON that can be read.", _EXAMPLE) from error
    return parse(document)


def to_json(lesson: Lesson, indent: int | None = 1) -> str:
    """As `load` reads it; fields that say nothing are left out."""
    steps = [{k: v for k, v in codec.plain(step).items() if v not in ("", {})} for step in lesson.steps]
    document = {"title": lesson.title, "minutes": lesson.minutes, "steps": steps}
    return json.dumps(document, indent=indent, ensure_ascii=False, separators=(",", ":") if indent is None else None)


def pack(lesson: Lesson) -> str:
    """The whole lesson as one word for a link.

    Raises:
        TrspError: it would be longer than `MOST_IN_LINK` letters.
    """
    squeezed = zlib.compress(to_json(lesson, indent=None).encode(), 9)
    word = PACKED + base64.urlsafe_b64encode(squeezed).decode().rstrip("=")
    if len(word) > MOST_IN_LINK:
        raise TrspError(
            f"This lesson is too long for a link: {formatting.count(len(word))} letters, at most "
            f"{formatting.count(MOST_IN_LINK)} fit.",
            "Give the file itself to your class, or shorten its texts.",
        )
    return word


def unpack(word: str) -> Lesson:
    """What `pack` made.

    Raises:
        TrspError: it was cut short or changed on the way, is too long, or holds no lesson.
    """
    body = word.removeprefix(PACKED)
    broken = TrspError(
        "The lesson in this link cannot be read: the link was cut short or changed.", "Ask for the link again."
    )
    if len(word) > MOST_IN_LINK or not word.startswith(PACKED):
        raise broken
    try:
        squeezed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        decompressor = zlib.decompressobj()
        text = decompressor.decompress(squeezed, MOST_BYTES)
        if not decompressor.eof:
            raise broken
    except (binascii.Error, ValueError, zlib.error) as error:
        raise broken from error
    return load(text)


def find(word: str) -> Lesson:
    """The lesson that a link's `lesson=` means: one that ships with the app by its name, or the one in the link.

    Raises:
        TrspError: there is none of this name, or it cannot be read.
    """
    if word.startswith(PACKED):
        return unpack(word)
    if word in shipped():
        return shipped()[word]
    raise TrspError(f"There is no lesson {_quoted(word)}.", f"Name one of {', '.join(shipped())}.")


@lru_cache(maxsize=1)
def shipped() -> Mapping[str, Lesson]:
    """The lessons in assets/lessons by name, shortest first.

    Raises:
        TrspError: one of them cannot be used, which a test forbids.
    """
    folder = paths.ASSETS / "lessons"
    lessons = {file.stem: load(file.read_bytes()) for file in folder.glob("*.json") if _SHIPPED.fullmatch(file.stem)}
    return dict(sorted(lessons.items(), key=lambda item: (item[1].minutes, item[0])))
