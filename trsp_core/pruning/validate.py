"""Checks which settings go together, and whether they fit a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from trsp_core import formatting
from trsp_core.errors import Problem, TrspError, refuse
from trsp_core.pruning import methods, transfers
from trsp_core.schema.config import KNOBS, PACKED, RunConfig, layers_to_remove, parse, parse_layers, settings_in


def check(config: RunConfig, n_layers: int | None = None, max_length: int | None = None) -> list[Problem]:
    """The contradictions between settings; and, where the model is known, the settings that it cannot satisfy.

    Args:
        n_layers: the model's number of layers; None where not known.
        max_length: its longest context in tokens; None where not known, or without a limit.
    """
    problems: list[Problem] = []

    def wrong(name: str, message: str, remedy: str) -> None:
        problems.append(Problem(name, message, remedy))

    manual_layers: list[int] | None = None
    if config.method == "manual":
        if not config.layers.strip():
            wrong("layers", "The method manual needs the layers to remove.", 'Set --layers, for example "13-18".')
        else:
            try:
                manual_layers = parse_layers(config.layers)
            except TrspError as error:
                wrong("layers", error.message, error.remedy)
    elif config.layers.strip():
        wrong("layers", f"Layers are given, but the method is {config.method}.", "Set --method manual, or no layers.")
    if not 0 < config.ratio < 1 and config.method != "manual":
        what = "nothing" if config.ratio <= 0 else "everything"
        wrong(
            "ratio",
            f"A ratio of {formatting.setting(config.ratio)} removes {what}.",
            "Choose a ratio above 0 and below 1.",
        )
    for name in ("model", "text", "heldout"):
        if not getattr(config, name).strip():
            wrong(name, f"{KNOBS[name].label}: nothing was given.", f"Set {KNOBS[name].flag}.")
    problems += methods.check(config) + transfers.check(config)
    if config.precision in PACKED:
        _check_packed(config, wrong)
    if config.probe_blocks > config.measure_blocks:
        wrong(
            "probe_blocks",
            f"A probe of {config.probe_blocks} blocks is more than the {config.measure_blocks} measured ones.",
            "Lower --probe-blocks or raise --measure-blocks.",
        )
    if config.sample_tokens and not config.prompt.strip():
        wrong("prompt", "The sample prompt is empty.", "Write a prompt, or set --sample-tokens to 0.")
    if max_length is not None:
        for name in ("block_length", "measure_length"):
            if getattr(config, name) > max_length:
                wrong(
                    name,
                    f"{KNOBS[name].label}: {getattr(config, name)} tokens, but this model reads at most {max_length}.",
                    f"Set {KNOBS[name].flag} to {max_length} or less.",
                )
    if n_layers is not None and not problems:
        _check_depth(config, n_layers, manual_layers, wrong)
    return problems


def _check_packed(config: RunConfig, wrong: Any) -> None:
    method = methods.get(config.method)
    if config.learn_weights:
        wrong(
            "learn_weights",
            f"Weights packed as {config.precision} cannot learn themselves.",
            "Set --learn-weights false, or --precision float32.",
        )
    if config.stage2_steps and not config.adapter_rank:
        wrong(
            "adapter_rank",
            f"Weights packed as {config.precision} cannot learn themselves: stage 2 needs adapters on them.",
            "Set --adapter-rank, for example to 8, or --stage2-steps 0.",
        )
    if method.reads_weights:
        wrong(
            "method",
            f"The method {method.name} reads or changes the weights themselves, which are packed as "
            f"{config.precision}.",
            "Choose another method, or --precision float32.",
        )


def _check_depth(config: RunConfig, n_layers: int, manual_layers: list[int] | None, wrong: Any) -> None:
    if manual_layers is not None:
        beyond = [i for i in manual_layers if i >= n_layers]
        if beyond:
            wrong(
                "layers",
                f"Layer {beyond[0]} does not exist: this model has layers 0 to {n_layers - 1}.",
                "Name layers of this model.",
            )
        elif len(manual_layers) >= n_layers:
            wrong("layers", f"All {n_layers} layers are named.", "Leave at least one layer.")
        return
    count = layers_to_remove(config.ratio, n_layers)
    if config.cycles > max(count, 1):
        wrong("cycles", f"{config.cycles} cycles, but only {count} layers are to go.", f"Set --cycles {count} or less.")
        return
    if count == 0:
        wrong(
            "ratio",
            f"A ratio of {formatting.setting(config.ratio)} of {n_layers} layers rounds to none.",
            f"Choose at least {formatting.figure(0.5 / n_layers)}.",
        )
        return
    if count >= n_layers:
        wrong(
            "ratio",
            f"A ratio of {formatting.setting(config.ratio)} of {n_layers} layers removes them all.",
            f"Choose less than {formatting.figure((n_layers - 0.5) / n_layers)}.",
        )
        return
    ends = methods.get(config.method).ends
    free = n_layers - max(config.protect_first, ends) - max(config.protect_last, ends)
    # Without neighbours, each greedy choice can take up to three candidates away.
    most = max(0, (free + 2) // 3) if config.no_neighbours else max(0, free)
    if count > most:
        why = "protected ends" + (" and no two neighbours" if config.no_neighbours else "")
        wrong(
            "ratio",
            f"{count} of {n_layers} layers are to go, but with {why} only {most} are sure to be free.",
            "Lower the ratio, or protect less.",
        )


def from_values(values: Mapping[str, Any], preset: str | None = None) -> RunConfig:
    """A checked config from loose values (JSON, flags, a form, a URL).

    Args:
        values: values by setting; a missing setting takes the preset's value or its default.
        preset: a key of `PRESETS`, or None.

    Raises:
        TrspError: unknown names, wrong types, values out of bounds, or else contradictions; it names all of them.
    """
    config = parse(values, preset)
    refuse(check(config))
    return config


@functools.lru_cache(maxsize=1024)
def from_json(text: str) -> RunConfig:
    """The config from the text of a run's `config.json`.

    Raises:
        TrspError: it is no JSON, has a newer schema, or holds settings that cannot be used.
    """
    return from_values(settings_in(text))
