"""What each layer was worth in the dense model, and each kept one in the pruned model: for runs that delete first, and
so have no trained model with all layers to weigh. It is `importance.json` in the run folder. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trsp_core.errors import TrspError
from trsp_core.files import write_atomic
from trsp_core.runs.store import Run
from trsp_core.schema import codec, messages
from trsp_core.schema.events import ImportanceMeasured
from trsp_core.schema.messages import Answer
from trsp_core.schema.run_state import RunState

FILE = "importance.json"


@dataclass(frozen=True)
class Weighing:
    """How much the loss rises without each layer alone: nats, the mean of both domains.

    Attributes:
        before: by layer of the dense model, L entries.
        after: by layer of the pruned model, L - K entries.
    """

    before: list[float]
    after: list[float]


def rises(answers: Sequence[Answer]) -> list[float]:
    """The figures in the answers to an `Importance`, by layer."""
    by_layer = {a.layer: a.value for a in answers if isinstance(a, messages.LayerRated)}
    return [by_layer[layer] for layer in sorted(by_layer)]


def keep(run: Run, weighing: Weighing) -> None:
    """Store it with `run`.

    Raises:
        OSError: the folder cannot be written.
    """
    write_atomic(run.folder / FILE, codec.encode(weighing))


def read(run: Run, state: RunState) -> Weighing | None:
    """What was stored with `run`, whose events fold to `state`; None where nothing was, or it is of other layers.

    Raises:
        TrspError: the file is damaged.
    """
    try:
        weighing = codec.decode((run.folder / FILE).read_text("utf-8"), Weighing)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrspError(f"{FILE} of this run cannot be read.", "Delete it, and weigh the layers again.") from error
    removed = state.removed
    if removed is None or len(weighing.after) != len(removed.kept):
        return None
    return weighing if len(weighing.before) == len(removed.kept) + len(removed.removed) else None


def with_importance(state: RunState, weighing: Weighing) -> RunState:
    """`state` with the layers' importance before and after; that of a removed layer is not a number after."""
    assert state.removed is not None
    after = [math.nan] * len(weighing.before)
    for layer, rise in zip(state.removed.kept, weighing.after, strict=True):
        after[layer] = rise
    figures = {"dense": weighing.before, "trained": after}
    tokens = 2 * (messages.QUICK_TOKENS - 1)
    return replace(
        state,
        importance={name: ImportanceMeasured(name, values, 0.0, "", 1, tokens) for name, values in figures.items()},
    )
