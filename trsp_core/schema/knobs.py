"""A knob is declared once; its control, its flag, its check and its row in the docs are made from that.

`knob(...)` stands in a dataclass body as a field. `of(cls)` reads the declarations back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trsp_core import formatting
from trsp_core.errors import Problem, TrspError


@dataclass(frozen=True)
class Knob:
    """One setting of a run.

    Attributes:
        name: field name; the flag is `--name` with dashes.
        default: its type is the knob's type: bool, int, float or str.
        label: a few words, sentence case.
        help: what it is, and what happens when it goes up.
        group: where the form shows it (see `config.GROUPS`).
        low, high: inclusive bounds of a number, either both or none.
        choices: the allowed values of a string; () where any string may stand.
        unit: shown after the value.
        paper: where the paper speaks of it; "" where the knob is ours.
        log: steps of a slider are factors, not differences.
    """

    name: str
    default: bool | int | float | str
    label: str
    help: str
    group: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    unit: str = ""
    paper: str = ""
    log: bool = False

    @property
    def kind(self) -> type:
        return type(self.default)

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, value: Any) -> tuple[Any, Problem | None]:
        """Turn `value` (from JSON, a flag, a URL or a widget) into this knob's type, or say what is wrong with it."""
        try:
            typed = _READERS[self.kind](value)
        except (TypeError, ValueError, OverflowError):  # among them text that no file can hold
            want = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.kind]
            return self.default, self._problem(value, f"expected {want}")
        if self.choices and typed not in self.choices:
            return self.default, self._problem(value, f"expected one of {', '.join(self.choices)}")
        if self.kind in (int, float) and not self._within(typed):
            return self.default, self._problem(value, f"expected {self.bounds}")
        return typed, None

    @property
    def bounds(self) -> str:
        """The allowed range in words."""
        unit = f" {self.unit}" if self.unit else ""
        if self.low is None or self.high is None:
            return "any value"
        return f"{formatting.setting(self.low)} to {formatting.setting(self.high)}{unit}"

    def _within(self, value: float) -> bool:
        return self.low is None or self.high is None or self.low <= value <= self.high

    def _problem(self, value: Any, expected: str) -> Problem:
        return Problem(
            self.name, f"{self.label}: {_short(value)} was given, {expected}.", f"Set {self.flag} to {self._remedy()}."
        )

    def _remedy(self) -> str:
        if self.choices:
            return " or ".join(self.choices)
        if self.kind in (int, float):
            return f"{self.bounds}, for example {self.default}"
        return "true or false" if self.kind is bool else f"for example {self.default!r}"


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "yes", "on", "1"):
        return True
    if isinstance(value, str) and value.strip().lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError(value)


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    if not isinstance(value, (int, float, str)):
        raise TypeError(value)
    return int(value)


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _read_str(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4000 or "\x00" in value:
        raise ValueError(value)
    value.encode()
    return value


def whole(name: str, value: Any) -> int:
    """A whole number from a flag, a control or JSON.

    Args:
        name: what it is, for the refusal.

    Raises:
        TrspError: it is none; infinity and what is no number are none.
    """
    return _number(name, value, _read_int, "a whole number")


def number(name: str, value: Any) -> float:
    """A finite number; else as `whole`."""
    return _number(name, value, _read_float, "a number")


def _number(name: str, value: Any, reader: Callable[[Any], Any], kind: str) -> Any:
    try:
        return reader(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TrspError(f"{name}: {_short(value)} was given, expected {kind}.", "Give another value.") from error


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**70 else "a number of more than 70 digits"
    return text if len(text) <= 80 else text[:77] + "..."


_READERS: dict[type, Callable[[Any], Any]] = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}


def knob(default: Any, *, label: str, help: str, group: str, choices: Sequence[str] = (), **more: Any) -> Any:
    """A dataclass field that carries its `Knob` declaration; arguments as in `Knob`."""
    declared = {"label": label, "help": help, "group": group, "choices": tuple(choices), **more}
    return dataclasses.field(default=default, metadata={"knob": declared})


def of(cls: type) -> dict[str, Knob]:
    """The knobs declared in dataclass `cls`, by name, in order."""
    return {
        f.name: Knob(name=f.name, default=f.default, **f.metadata["knob"])  # type: ignore[arg-type]
        for f in dataclasses.fields(cls)
        if "knob" in f.metadata
    }
