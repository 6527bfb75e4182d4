"""The transfers, one file each: ways to move the work of the chosen layers into those that stay. They are found by
looking into this folder: to add one, add a file that defines `TRANSFER`.

The paper's transfer trains the whole model under a penalty, and deletes afterwards. A repair deletes first, and finds
new weights for layers that stay, in closed form or by training single layers; training of the whole may follow.
Transfer files import no torch at module level, since pages read their names and texts too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trsp_core.errors import Problem
from trsp_core.pruning import methods
from trsp_core.registry import Registry
from trsp_core.schema.config import PACKED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trsp_core.pruning.lab import Lab
    from trsp_core.schema.config import RunConfig
    from trsp_core.schema.events import Event

    Edits = Generator[Event, None, Mapping[nn.Parameter, Tensor]]


OWN_HEAD = "a head of its own"  # that is not the embedding


@dataclass(frozen=True)
class Cost:
    """What a repair costs, for forecasts.

    Attributes:
        passes: forward passes of the whole model over all calibration blocks.
        climbs: those passes begin at the layer below the first deleted one.
        squares: whether it solves, for each layer, with an (F, F) matrix: the sum of products of what the MLP's output
            projection reads.
        states: how many hidden states (N, D) of all N calibration tokens it holds at once.
        copies: how many times the model's weights it holds at once, beside the model: new ones and old ones.
    """

    passes: float = 0.0
    climbs: bool = False
    squares: bool = False
    states: int = 0
    copies: float = 0.0


@dataclass(frozen=True)
class Transfer:
    """One way to move the chosen layers' work into the layers that stay.

    Attributes:
        name: what `--transfer` takes.
        title: its name for people.
        paper: citation; "" for one of our own.
        summary: one sentence: what it does to the layers that stay.
        equation: what it minimises or solves, in LaTeX.
        repair: called with a `Lab`, the config and the chosen layers; a generator of events that returns new values for
            parameters of the layers that stay, and leaves the model bit-identical. None for a transfer without repair.
        opens: called with a `Lab` and the chosen layers, [] where none is chosen yet, for the linear maps that `repair`
            changes. In a packed model they are unpacked for it, and stay so. None for a repair that changes more.
        require: raises TrspError for a model that `repair` would refuse; asked before any work.
        needs: what has to be there: `methods.LAYER_WEIGHTS` of the method that chooses, OWN_HEAD of the model.
        contradictions: called with the config, for the settings that do not go with it, beside those that `check` finds
            by what is declared here; None where there are none.
        in_order: the repair goes up layer by layer, and tells how near each comes to the dense model's state.
        cost: of `repair`.
    """

    name: str
    title: str
    paper: str
    summary: str
    equation: str
    repair: Callable[[Lab, RunConfig, list[int]], Edits] | None = None
    require: Callable[[Lab], None] | None = None
    opens: Callable[[Lab, list[int]], list[nn.Module]] | None = None
    needs: tuple[str, ...] = ()
    contradictions: Callable[[RunConfig], list[Problem]] | None = None
    in_order: bool = False
    cost: Cost = Cost()


_registry = Registry(__name__, "TRANSFER", Transfer, first="penalty")
all_transfers, names, get = _registry.all, _registry.names, _registry.get


@contextmanager
def opened(lab: Lab, transfer: Transfer, chosen: list[int]) -> Iterator[None]:
    """Inside, the maps that the repair of `transfer` changes are unpacked, if they were packed; where none is `chosen`
    yet, those that it may change."""
    from trsp_core.surgery import quantization

    with quantization.opened(lab.stack, transfer.opens(lab, chosen) if transfer.opens else []):
        yield


def check(config: RunConfig) -> list[Problem]:
    """The settings in `config` that do not go with its transfer; [] where all do."""
    method, transfer, problems = methods.get(config.method), get(config.transfer), []
    if transfer.repair and (method.rewrite or method.narrow):
        what = "changes the weights that stay by itself" if method.rewrite else "removes no layer"
        problems.append(
            Problem(
                "transfer",
                f"The method {method.name} {what}, so there is nothing for {transfer.name} to solve.",
                "Set --transfer none, or choose another method.",
            )
        )
    if methods.LAYER_WEIGHTS in transfer.needs and methods.LAYER_WEIGHTS not in method.gives:
        givers = [m.name for m in methods.all_methods().values() if methods.LAYER_WEIGHTS in m.gives]
        problems.append(
            Problem(
                "transfer",
                f"The transfer {transfer.name} needs the weights that stage 1 learns for the layers, and the method "
                f"{method.name} learns none.",
                f"Set --method {' or '.join(givers)}, or --transfer none.",
            )
        )
    problems += transfer.contradictions(config) if transfer.contradictions else []
    if transfer.repair and not transfer.opens and config.precision in PACKED:
        openers = [t.name for t in all_transfers().values() if t.opens]
        problems.append(
            Problem(
                "transfer",
                f"The transfer {transfer.name} changes whole layers, whose weights are packed as {config.precision}.",
                f"Set --transfer {', '.join(openers)}, penalty or none, or --precision float32.",
            )
        )
    return problems
