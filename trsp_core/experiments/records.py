"""What is recorded of runs, of a plan or of a grid: a JSON file with a head and, a line each, what came of every run,
with its losses on each measured block. So any two that were measured on the same blocks can be compared block by block.
No torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from trsp_core.errors import TrspError
from trsp_core.evaluation.intervals import Interval
from trsp_core.files import write_atomic
from trsp_core.runs.store import Run
from trsp_core.schema import codec
from trsp_core.schema.run_state import RunState

SCHEMA = 1
DIGITS = 4  # of a KL divergence or a layer weight
MOST_NATS = 1e6  # a token; more is no loss

Record = TypeVar("Record")


def read(path: Path, kind: str, entries: str, build: Callable[[list[Any], dict[str, Any]], Record]) -> Record:
    """A recorded file.

    Args:
        kind: what it is a record of, for messages.
        entries: the name of its list.
        build: makes the record of that list and of the rest; whatever it raises says that the file is none.

    Raises:
        TrspError: it cannot be read.
    """
    try:
        document = json.loads(path.read_bytes())
        if document.pop("schema") > SCHEMA:
            raise TrspError(f"{path.name} was written by a newer version.", "Update the program.")
        return build(document.pop(entries), document)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise TrspError(f"{path.name} is no record of {kind}.", "Leave it out, or record it again.") from error


def to_json(record: Any, entries: str) -> str:
    """The file of a record, whose list is called `entries`."""
    head = {"schema": SCHEMA, **codec.plain(dataclasses.asdict(record))}
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in head.pop(entries))
    return f'{json.dumps(head, ensure_ascii=False)[:-1]}, "{entries}": [\n{lines}\n]}}\n'


def write(path: Path, content: str) -> None:
    """Raises TrspError: it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise TrspError(f"{path} cannot be written: {error.strerror}.", "Name another file with --out.") from error


def losses(state: RunState, measured: str, digits: int) -> dict[str, list[float]]:
    """By domain, mean nats a token of each measured block.

    Args:
        measured: "dense", "direct" or "pruned".
    """
    return {m.domain: [round(v, digits) for v in m.losses] for m in state.measured if m.state == measured}


def divergence(state: RunState) -> dict[str, float]:
    """By domain, mean nats a token from the dense model to the pruned one."""
    return {domain: round(v, DIGITS) for domain, v in state.divergence.get("pruned", {}).items()}


def fingerprints(state: RunState) -> dict[str, str]:
    """By domain, the fingerprint of the measured blocks: where two are equal, block by block can be compared."""
    return {t.domain: t.fingerprint for t in state.texts if t.role == "measure"}


def protocol(state: RunState) -> dict[str, str]:
    """By domain, a sentence: text, blocks, tokens, number format."""
    return {
        m.domain: f"{m.text}: {m.blocks} blocks of {m.block_length} tokens ({m.tokens:,} predicted), {m.dtype}"
        for m in state.measured
        if m.state == "dense"
    }


def day(runs: Iterable[Run]) -> str:
    """The day of the newest of `runs`."""
    return time.strftime("%Y-%m-%d", time.localtime(max(run.folder.stat().st_mtime for run in runs)))


def checked(values: list[float]) -> list[float]:
    """Losses read from JSON, which has no word for what is not a number: null stands for it.

    Raises:
        ValueError: none, or not in nats a token.
    """
    nats = [math.nan if v is None else float(v) for v in values]
    if not nats or any(abs(v) > MOST_NATS for v in nats):
        raise ValueError("no losses")
    return nats


def with_interval(interval: Interval) -> str:
    """`61.2 [58.0, 64.9]`."""
    return " ".join((_figure(interval.value), f"[{_figure(interval.low)}, {_figure(interval.high)}]"))


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return "not a number"
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"
