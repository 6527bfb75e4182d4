"""The methods of choosing what to remove, one file each. They are found by looking into this folder: to add one, add a
file that defines `METHOD`.

Method files import no torch at module level, since pages read their names and texts too. They work on a model through
`trsp_core.pruning.lab.Lab`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trsp_core.errors import Problem, TrspError
from trsp_core.registry import Registry
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

LAYER_WEIGHTS = "layer weights"
UNITS = 100  # of the choosing phase, for a method that takes no steps: `Progressed` counts hundredths


@dataclass(frozen=True)
class PassCounts:
    """How many forward passes of the whole model a method makes to score layers; for forecasts.

    Attributes:
        once: passes over the scored blocks (`score_blocks` of them), once for the whole choice.
        each_layer: passes over them for each of the L layers.
        each_pair: passes over them for each of the L layers in each of the K rounds.
        pool: passes over all calibration blocks.
        keeps: whether hidden states of the scored blocks are kept meanwhile, up to `perf.budget.SEARCH_ROOM` bytes.
        predicts: whether the dense model's probabilities at all of the scored blocks' tokens are kept meanwhile.
        slopes: whether gradients are taken, so that what happens in a pass is kept for the way back.
    """

    once: float = 0.0
    each_layer: float = 0.0
    each_pair: float = 0.0
    pool: float = 0.0
    keeps: bool = False
    predicts: bool = False
    slopes: bool = False

    def over_sample(self, n_layers: int, count: int) -> float:
        """Passes over the scored blocks in all, where K = `count` of L = `n_layers` are to go."""
        return self.once + self.each_layer * n_layers + self.each_pair * n_layers * count


@dataclass(frozen=True)
class Method:
    """One method of choosing layers.

    Attributes:
        name: what `--method` takes.
        title: its name for people.
        paper: citation; "" for a control of our own.
        summary: one sentence: by what the layers are chosen.
        differences: sentences: where it differs from its authors' code, or from their paper; "" where none is known.
        choose: called with a `Lab`, the config and K; a generator of events that returns the chosen layers in order of
            choice. It leaves the model bit-identical, also when closed in the middle, unless the config lets the
            weights learn (`learn_weights`).
        gives: what it leaves for a transfer: LAYER_WEIGHTS for the weight that each layer has in the end, in
            `Lab.layer_weights`.
        trains: it takes gradient steps on weights of layers, as the settings of stage 1 say.
        pass_counts: the passes that it makes beside those steps, for the forecast.
        contiguous: it chooses one run of neighbouring layers.
        ends: so many layers at each end are never chosen, whatever is protected beside them.
        reads_weights: it reads or changes the weights themselves, or takes gradients by them: not possible on packed
            ones.
        rewrite: called with a `Lab`, the config and the chosen layers; a generator of events that returns new values
            for parameters of the layers that stay, and leaves the model bit-identical. None for a method that only
            deletes.
        narrow: called with a `Lab`, the config and K, for a method that removes no layer (its `choose` returns []); a
            generator of events that returns a narrower layer for each of the L, and the entries of the config that
            describe them. None for a method that removes layers.
    """

    name: str
    title: str
    paper: str
    summary: str
    choose: Callable[[Lab, RunConfig, int], Choice]
    differences: str = ""
    gives: tuple[str, ...] = ()
    trains: bool = False
    pass_counts: PassCounts = PassCounts()
    contiguous: bool = False
    ends: int = 0
    reads_weights: bool = False
    rewrite: Callable[[Lab, RunConfig, list[int]], Edits] | None = None
    narrow: Callable[[Lab, RunConfig, int], Narrowing] | None = None


_registry = Registry(__name__, "METHOD", Method, first="trsp")
all_methods, names, get = _registry.all, _registry.names, _registry.get


def check(config: RunConfig) -> list[Problem]:
    """The settings in `config` that do not go with its method; [] where all do."""
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
            "Cycles take turns between choosing and stage 2: not with one shot, layers that are deleted first, or no "
            "steps of stage 2.",
            "Set --cycles 1, or --one-shot false, --control none, --transfer penalty and --stage2-steps above 0.",
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
    if config.cycles > 1 and config.stage1_stretch > 1:
        wrong(
            "stage1_stretch",
            "Cycles share out steps whose number is known before; rounds that go on have none.",
            "Set --stage1-stretch 1, or --cycles 1.",
        )
    for name in ("protect_first", "protect_last", "no_neighbours"):
        if method.narrow and getattr(config, name):
            wrong(
                name,
                f"The method {method.name} narrows every layer alike: none can be spared.",
                f"Set {KNOBS[name].flag} {'false' if name == 'no_neighbours' else 0}, or choose another method.",
            )
    return problems


def most_steps(config: RunConfig, count: int) -> int:
    """How many steps the choice of `count` layers takes at most, for a method that `trains`."""
    stretch = config.stage1_stretch if config.method == "trsp" else 1
    return config.stage1_steps * stretch * (1 if config.one_shot else count)


def progressed(done: float, whole: float) -> Progressed:
    """The event that `done` of `whole` is over, counted in `UNITS`."""
    return Progressed(round(UNITS * done / whole))


def tell(lab: Lab, config: RunConfig, method: str, scores: Sequence[float]) -> Generator[Event, None, None]:
    """Yield one event with the scores of all L layers: None for a layer that may not be chosen, or whose score is not a
    number."""
    free = set(lab.unprotected(config))
    values = [None if i not in free or math.isnan(score) else score for i, score in enumerate(scores)]
    yield LayersScored(method, values)


def pick(lab: Lab, config: RunConfig, scores: Sequence[float], chosen: list[int], round_: int) -> LayerChosen:
    """Add the candidate with the lowest of the L `scores` to `chosen`, and return the event that tells it. Of equal
    scores the lowest layer's wins; a score that is not a number comes last.

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
    """Choose the `count` layers of lowest score, one after the other; yields the scores and each choice, returns the
    layers.

    Raises:
        TrspError: too few candidates are left.
    """
    yield from tell(lab, config, method, scores)
    chosen: list[int] = []
    while len(chosen) < count:
        yield pick(lab, config, scores, chosen, 1)
    return chosen


def pick_run(method: str, scores: Mapping[int, float], n_layers: int, count: int) -> Choice:
    """Choose the run of `count` neighbouring layers that has the lowest score; yields the scores and each layer of it,
    returns the layers from the bottom up.

    Args:
        scores: the score of each run that may be chosen, by its first layer.

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
