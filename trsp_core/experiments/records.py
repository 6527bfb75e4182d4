"""What is recorded of runs, of a plan or of a grid: a JSON file with a head and, a line each, what came of every run,
with its losses on each measured block. So any two that were measured on the same blocks can be compared block by block.
No torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.evaluation.intervals import Interval
from trsp_core.files import write_atomic
from trsp_core.runs.store import Run
from trsp_core.schema import codec
from trsp_core.schema.run_state import RunState

SCHEMA = 1
DIGITS = 4  # of a KL divergence or a layer weight
LOSS_DIGITS = 8  # of a loss: a perplexity made of them is the run's own in every place that is shown
MOST_NATS = 1e6  # a token; more is no loss

Record = TypeVar("Record")


def read(path: Path, kind: str, record: type[Record], check: Callable[[Record], None]) -> Record:
    """A recorded file.

    Args:
        kind: what it is a record of, for messages.
        record: the class of the record.
        check: raises ValueError where one cannot reckon with a figure.

    Raises:
        TrspError: it cannot be read.
    """
    try:
        values = codec.decode_document(path.read_bytes(), SCHEMA, record)
        check(values)
    except (OSError, ValueError) as error:
        raise TrspError(f"{path.name} is no record of {kind}.", "Leave it out, or record it again.") from error
    return values


def to_json(record: Any, entries: str) -> str:
    """The file of a record, whose list is called `entries`; a line each."""
    head = codec.encode_document(dataclasses.replace(record, **{entries: []}), SCHEMA)
    lines = ",\n".join(map(codec.encode, getattr(record, entries)))
    return head.replace(f'"{entries}": []', f'"{entries}": [\n{lines}\n]') + "\n"


def write(path: Path, content: str) -> None:
    """Raises TrspError: it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise TrspError(f"{path} cannot be written: {error.strerror}.", "Name another file with --out.") from error


def losses(state: RunState, measured: str) -> dict[str, list[float]]:
    """By domain, mean nats a token of each measured block.

    Args:
        measured: "dense", "direct" or "pruned".
    """
    return {m.domain: [round(v, LOSS_DIGITS) for v in m.losses] for m in state.measured if m.state == measured}


def divergence(state: RunState) -> dict[str, float]:
    """By domain, mean nats a token from the dense model to the pruned one."""
    return {domain: round(v, DIGITS) for domain, v in state.divergence.get("pruned", {}).items()}


def fingerprints(state: RunState) -> dict[str, str]:
    """By domain, the fingerprint of the measured blocks: where two are equal, block by block can be compared."""
    return {t.domain: t.fingerprint for t in state.texts if t.role == "measure"}


def protocol(state: RunState) -> dict[str, str]:
    """By domain, a sentence: text, blocks, tokens, number format."""
    return {
        m.domain: f"{m.text}: {m.blocks} blocks of {m.block_length} tokens ({formatting.count(m.tokens)} predicted), "
        f"{m.dtype}"
        for m in state.measured
        if m.state == "dense"
    }


def day(runs: Iterable[Run]) -> str:
    """The day of the newest of `runs`."""
    return time.strftime("%Y-%m-%d", time.localtime(max(run.folder.stat().st_mtime for run in runs)))


def check_losses(losses: Mapping[str, list[float]]) -> None:
    """Raise ValueError: a domain has none, or they are not in nats a token. A loss may be what is not a number."""
    if any(not values or any(abs(v) > MOST_NATS for v in values) for values in losses.values()):
        raise ValueError("no losses")


def with_interval(interval: Interval) -> str:
    """A perplexity with its interval: `61.2 [58.0, 64.9]`."""
    return formatting.interval(interval.value, interval.low, interval.high, formatting.perplexity)
