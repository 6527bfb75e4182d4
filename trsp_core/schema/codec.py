"""Typed records as JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, TypeVar


def values(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as values that JSON can carry."""
    return {f.name: plain(getattr(record, f.name)) for f in dataclasses.fields(record)}


def build(kind: type[T], given: dict[str, Any]) -> T:
    """The dataclass `kind` with fields from decoded JSON; what `values` gave comes back equal, but for null.

    Raises:
        ValueError, TypeError: fields that are missing, unknown, or of another type.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if set(given) - set(known):
        raise ValueError("unknown fields")
    record = kind(**given)
    for name in given:
        fits(getattr(record, name), str(known[name].type))
    return record


def plain(value: Any) -> Any:
    """`value` as JSON can carry it: not-a-number and infinity become None, tuples lists."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def fits(value: Any, annotation: str) -> None:
    """Raise TypeError unless a decoded JSON `value` fits a field's annotation; null stands for not-a-number.

    Numbers that a machine word or a float cannot hold, and text that no file can, fit nowhere (the latter raises
    UnicodeEncodeError, which is a ValueError).
    """
    base, _, inner = annotation.partition("[")
    if base == "list":
        if not isinstance(value, list):
            raise TypeError(annotation)
        for entry in value:
            fits(entry, inner[:-1])
    elif base == "dict":
        if not isinstance(value, dict):
            raise TypeError(annotation)
        of = inner[:-1].partition(", ")[2]
        for key, entry in value.items():
            fits(key, "str")
            fits(entry, of)
    elif base == "Any":
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    elif value is None:
        if "float" not in annotation and "None" not in annotation:
            raise TypeError(annotation)
    else:
        allowed = {"int": int, "float": (int, float), "str": str, "bool": bool}[annotation.split(" | ")[0]]
        if not isinstance(value, allowed) or isinstance(value, bool) != (allowed is bool):
            raise TypeError(annotation)
        if isinstance(value, str):
            value.encode()
        elif not abs(value) < (LARGEST if isinstance(value, int) else math.inf):
            raise TypeError(annotation)


LARGEST = 2**63  # no count or size of ours comes near
T = TypeVar("T")
