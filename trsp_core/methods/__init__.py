"""The methods, one file each, found by looking into this folder: to add one, add a file that defines `METHOD`.

Method files import no torch at module level: their names and texts are read by pages too. What they do to a model goes
through the verbs of `trsp_core.lab.Lab`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from trsp_core.errors import TrspError

if TYPE_CHECKING:
    from trsp_core.config import RunConfig
    from trsp_core.events import Event
    from trsp_core.lab import Lab

    Choice = Generator[Event, None, list[int]]


@dataclass(frozen=True)
class Method:
    """One way to choose layers.

    Attributes:
        name: what `--method` takes.
        title: for people.
        paper: citation; "" for a control of our own.
        summary: one sentence: by what the layers are chosen.
        choose: generator of events over a `Lab`, returning the chosen layers in order of choice. It leaves the model
            bit-identical, also when closed in the middle, unless the config lets the weights learn.
        trains: it takes gradient steps on the layer weights, as the settings of stage 1 say; for the forecast.
    """

    name: str
    title: str
    paper: str
    summary: str
    choose: Callable[[Lab, RunConfig, int], Choice]
    trains: bool = False


@cache
def all_methods() -> dict[str, Method]:
    """Every method in this folder, by name, TRSP first."""
    found = [importlib.import_module(f"{__name__}.{module.name}").METHOD for module in pkgutil.iter_modules(__path__)]
    return {m.name: m for m in sorted(found, key=lambda m: (m.name != "trsp", m.name))}


def names() -> tuple[str, ...]:
    return tuple(all_methods())


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        TrspError: there is none.
    """
    if name not in all_methods():
        raise TrspError(f"There is no method {name[:60]!r}.", f"Take one of {', '.join(names())}.")
    return all_methods()[name]
