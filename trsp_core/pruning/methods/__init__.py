"""The methods, one file each, found by looking into this folder: to add one, add a file that defines `METHOD`.

Method files import no torch at module level: their names and texts are read by pages too. What they do to a model goes
through the verbs of `trsp_core.pruning.lab.Lab`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from trsp_core.errors import Problem, TrspError
from trsp_core.schema.config import KNOBS
from trsp_core.schema.events import LayerChosen, LayersScored, Progressed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trsp_core.pruning.lab import Lab
    from trsp_core.schema.config import RunConfig
    from trsp_core.schema.events import Event

    Choice = Generator[Event, None, list[int]]
    Narrowing = Generator[Event, None, tuple[list[nn.Module], dict[str, int]]]
    Edits = Generator[Event, None, Mapping[nn.Parameter, Tensor]]

UNITS = 100  # of the choosing phase for a method that scores: `Progressed` tells hundredths


@dataclass(frozen=True)
class PassCounts:
    """What a method reads, in forward passes of the whole model, for forecasts.

    Attributes:
        once, each_layer, each_pair: passes over the scored blocks: in all, for each of the L layers, and for each of
            the L layers in each of the K rounds.
        pool: passes over all calibration blocks.
        keeps: hidden states of the scored blocks are kept, up to `SEARCH_ROOM`.
    """

    once: float = 0.0
    each_layer: float = 0.0
    each_pair: float = 0.0
    pool: float = 0.0
    keeps: bool = False

    def over_sample(self, n_layers: int, count: int) -> float:
        """Passes over the scored blocks for K = `count` of L = `n_layers`."""
        return self.once + self.each_layer * n_layers + self.each_pair * n_layers * count


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
        pass_counts: what it reads beside that; for the forecast.
        contiguous: it chooses one run of neighbouring layers.
        reads_weights: it reads, differentiates by or changes the weights themselves, so that packed ones will not do.
        rewrite: generator of events over a `Lab` and the chosen layers, returning new values for weights of the layers
            that stay; None for a method that only deletes. It leaves the model bit-identical.
        narrow: for a method that removes no layer: generator of events over a `Lab` and K, returning a narrower layer
            for each of the L, and the config's entries that describe them; `choose` returns none then.
    """

    name: str
    title: str
    paper: str
    summary: str
    choose: Callable[[Lab, RunConfig, int], Choice]
    trains: bool = False
    pass_counts: PassCounts = PassCounts()
    contiguous: bool = False
    reads_weights: bool = False
    rewrite: Callable[[Lab, RunConfig, list[int]], Edits] | None = None
    narrow: Callable[[Lab, RunConfig, int], Narrowing] | None = None


@cache
def all_methods() -> dict[str, Method]:
    """Every method in this folder, by name, TRSP first."""
    methods = [importlib.import_module(f"{__name__}.{module.name}").METHOD for module in pkgutil.iter_modules(__path__)]
    return {m.name: m for m in sorted(methods, key=lambda m: (m.name != "trsp", m.name))}


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


def check(config: RunConfig) -> list[Problem]:
    """What does not go with the method that `config` names."""
    method, problems = get(config.method), []

    def wrong(name: str, message: str, remedy: str) -> None:
        problems.append(Problem(name, message, remedy))

    if method.contiguous and config.no_neighbours:
        wrong(
            "no_neighbours",
            f"The method {method.name} chooses neighbouring layers, and no two neighbours are allowed.",
            "Set --no-neighbours false, or choose another method.",
        )
    if config.cycles > 1 and (method.contiguous or method.rewrite or config.method == "manual"):
        wrong(
            "cycles",
            f"The method {method.name} names all its layers at once, so there is nothing to choose again.",
            "Set --cycles 1, or choose another method.",
        )
    elif config.cycles > 1 and (config.one_shot or config.deletes_first or not config.stage2_steps):
        wrong(
            "cycles",
            "Cycles take turns between choosing and stage 2: not with one shot, delete_first or no steps of stage 2.",
            "Set --cycles 1, or --one-shot false, --control none and --stage2-steps above 0.",
        )
    if method.rewrite and config.stage2_steps and not config.deletes_first:
        wrong(
            "stage2_steps",
            f"The method {method.name} changes the weights that stay as it deletes, so nothing can be taught before.",
            "Set --stage2-steps 0, or --control delete_first.",
        )
    if method.narrow and config.distil and config.distil_from == "states":
        wrong(
            "distil_from",
            f"The method {method.name} removes no layer, so there are no states behind removed ones to distil.",
            "Set --distil-from logits.",
        )
    if method.narrow and config.stage2_steps and not config.deletes_first:
        wrong(
            "stage2_steps",
            f"The method {method.name} removes no layer, so there is none whose knowledge could move before.",
            "Set --stage2-steps 0, or --control delete_first to train the narrowed model.",
        )
    for name in ("protect_first", "protect_last", "no_neighbours"):
        if method.narrow and getattr(config, name):
            wrong(
                name,
                f"The method {method.name} narrows every layer alike: none can be spared.",
                f"Set {KNOBS[name].flag} {'false' if name == 'no_neighbours' else 0}, or choose another method.",
            )
    return problems


def progressed(done: float, whole: float) -> Progressed:
    """`done` of `whole`, in `UNITS`."""
    return Progressed(round(UNITS * done / whole))


def tell(lab: Lab, config: RunConfig, method: str, scores: Sequence[float]) -> Generator[Event, None, None]:
    """Tell the scores of all L layers; a protected one has none, nor one that was not scored (not a number)."""
    free = set(lab.unprotected(config))
    values = [None if i not in free or math.isnan(score) else score for i, score in enumerate(scores)]
    yield LayersScored(method, values)


def pick(lab: Lab, config: RunConfig, scores: Sequence[float], chosen: list[int], round_: int) -> LayerChosen:
    """Move the candidate with the lowest of the L `scores` into `chosen`; ties go to the lowest layer, a score that is
    no number goes last.

    Raises:
        TrspError: no candidate is left.
    """
    ranked = sorted(lab.candidates(config, chosen), key=lambda i: (math.isnan(scores[i]), scores[i], i))
    if not ranked:
        raise TrspError("No layer is left that may be chosen.", "Lower the ratio, or protect less.")
    winner, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    chosen.append(winner)
    margin = scores[runner_up] - scores[winner] if runner_up is not None else None
    return LayerChosen(round_, winner, scores[winner], runner_up, margin)


def pick_all(lab: Lab, config: RunConfig, method: str, scores: Sequence[float], count: int) -> Choice:
    """Tell the scores and choose the `count` lowest, one after the other."""
    yield from tell(lab, config, method, scores)
    chosen: list[int] = []
    while len(chosen) < count:
        yield pick(lab, config, scores, chosen, 1)
    return chosen


def pick_run(method: str, scores: Mapping[int, float], n_layers: int, count: int) -> Choice:
    """Choose the `count` neighbouring layers whose first layer has the lowest score.

    Args:
        scores: by the first layer of each such run.

    Raises:
        TrspError: there is no such run.
    """
    if not scores:
        raise TrspError(f"There is no run of {count} neighbouring layers to choose.", "Lower the ratio, protect less.")
    yield LayersScored(method, [scores.get(i) for i in range(n_layers)])
    ranked = sorted(scores, key=lambda i: (math.isnan(scores[i]), scores[i], i))
    first, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    margin = scores[runner_up] - scores[first] if runner_up is not None else None
    for layer in range(first, first + count):
        yield LayerChosen(1, layer, scores[first], runner_up, margin)
    return list(range(first, first + count))
