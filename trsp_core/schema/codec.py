"""Dataclasses as JSON and back: events, requests and answers, plans, records, lessons, summaries all pass through here.

JSON has no word for infinity or for what is not a number: both are written as null. Null reads back as `math.nan` in a
field that is declared as `float`, and as None in one that is declared as `float | None`. So what is read has the type
that its field declares, or is refused with a ValueError.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, TypeVar

from trsp_core.errors import TrspError

T = TypeVar("T")
LARGEST = 2**63  # no count or size comes near


def encode(value: Any, indent: int | None = None) -> str:
    """JSON text of a dataclass, or of values that hold some."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def decode(text: str | bytes, kind: type[T]) -> T:
    """A `kind` read from JSON text. With `dict` or `list` nothing inside is checked: the caller does that.

    Raises:
        ValueError: no JSON, or it does not fit.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("too many brackets inside each other") from error
    return build(kind, value)


def plain(value: Any) -> Any:
    """`value` in the types of JSON: a dataclass becomes a dict of its fields, a tuple a list, NaN and infinity None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def build(kind: type[T], value: Any) -> T:
    """A `kind` made of `value`, in the form that `plain` gives it; a field with a default may be missing.

    Raises:
        ValueError: fields that are missing, unknown, or of another type; text that no file can hold; numbers beyond
            `LARGEST`, or beyond a float.
    """
    return _reader(kind)(value)


def encode_document(record: Any, schema: int, indent: int | None = None) -> str:
    """JSON text of a dataclass, with the number of its format in front: for files that outlive a version."""
    return encode({"schema": schema, **plain(record)}, indent)


def decode_document(text: str | bytes, schema: int, kind: type[T]) -> T:
    """A `kind` read from what `encode_document` wrote, in format `schema` or an older one.

    Raises:
        TrspError: a newer version of this program wrote it.
        ValueError: no JSON, or it does not fit.
    """
    values = decode(text, dict)
    number = build(int, values.pop("schema", None))
    if number > schema:
        raise TrspError(
            f"This was written by a newer version (schema {number}, this one reads {schema}).", "Update the program."
        )
    return build(kind, values)


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """The function that turns a JSON value into a `kind`, or raises ValueError."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (part,) = (part for part in parts if part is not types.NoneType)
        return partial(_optional, _reader(part))
    if kind is Any:
        return _anything
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return partial(_record, kind, {f.name: _reader(hints[f.name]) for f in dataclasses.fields(kind)})
    if origin in (list, tuple):
        return partial(_sequence, origin, _reader(parts[0]) if parts else None)
    if issubclass(origin, Mapping):
        return partial(_mapping, _reader(parts[1]) if parts else None)
    return {int: _int, float: _float, str: _str, bool: _bool}[kind]


def _record(kind: type, readers: Mapping[str, Callable[[Any], Any]], value: Any) -> Any:
    if not isinstance(value, dict) or not value.keys() <= readers.keys():
        raise ValueError(f"no {kind.__name__}, or unknown fields in it")
    fields = {name: readers[name](entry) for name, entry in value.items()}
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"a {kind.__name__} without some of its fields") from error


def _sequence(kind: type, reader: Callable[[Any], Any] | None, value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError("no list")
    return kind(value if reader is None else map(reader, value))


def _mapping(reader: Callable[[Any], Any] | None, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value if reader is None else {_str(key): reader(entry) for key, entry in value.items()}


def _optional(reader: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else reader(value)


def _anything(value: Any) -> Any:
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _int(value: Any) -> int:
    if type(value) is not int or abs(value) >= LARGEST:
        raise ValueError("no whole number")
    return value


def _float(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) is int:
        return _int(value)
    if type(value) is not float or not math.isfinite(value):
        raise ValueError("no number")
    return value


def _str(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("no text")
    value.encode()
    return value


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("neither true nor false")
    return value
