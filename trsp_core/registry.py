"""Finds what a package declares, one file each: methods, transfers, families."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cached_property
from typing import Generic, Protocol, TypeVar

from trsp_core.errors import TrspError


class Named(Protocol):
    """What a registry holds: a thing with a name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)
Declared = TypeVar("Declared")


def declared(package: str, constant: str, kind: type[Declared]) -> list[Declared]:
    """What the modules right inside `package` call `constant`, by file name; each a `kind`."""
    folder = importlib.import_module(package).__path__
    names = [f"{package}.{module.name}" for module in pkgutil.iter_modules(folder)]
    return [getattr(importlib.import_module(name), constant) for name in names]


class Registry(Generic[T]):
    """What the files of a package declare, by name. They are loaded when it is first asked.

    Args:
        package: its full name; each module right inside defines `constant`, a `kind`.
        first: the name that comes first; the others follow in the order of the alphabet.
    """

    def __init__(self, package: str, constant: str, kind: type[T], first: str):
        self._package, self._constant, self._kind, self._first = package, constant, kind, first

    @cached_property
    def _entries(self) -> dict[str, T]:
        entries = declared(self._package, self._constant, self._kind)
        return {e.name: e for e in sorted(entries, key=lambda e: (e.name != self._first, e.name))}

    def all(self) -> dict[str, T]:
        """All of them, by name."""
        return self._entries

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def get(self, name: str) -> T:
        """The one called `name`.

        Raises:
            TrspError: there is none.
        """
        if name not in self._entries:
            kind = self._kind.__name__.lower()
            raise TrspError(f"There is no {kind} {name[:60]!r}.", f"Take one of {', '.join(self.names())}.")
        return self._entries[name]
