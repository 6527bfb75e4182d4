"""The record of a model's single layers: `assets/what_if.json`, which `trsp_core.workbench.recorded` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from trsp_core.data import blocks, corpora
from trsp_core.evaluation import perplexity
from trsp_core.models import catalog, loading
from trsp_core.schema import messages
from trsp_core.schema.messages import WhatIf
from trsp_core.surgery import discovery
from trsp_core.workbench import recorded, what_if
from trsp_core.workbench.model_cache import Model
from trsp_core.workbench.recorded import LayerRecord, RecordedSet
from trsp_core.workbench.what_if import LayerStudy

DIGITS = 8


def record(request: WhatIf, run_set: Iterable[int] = ()) -> LayerRecord:
    """Measure the model of `request` without each layer alone, without none, and without two sets of as many layers as
    `run_set`: that one, and those of the lowest block influence."""
    loaded, tokenizer = loading.load(request.model, device="cpu")
    stack = discovery.find(loaded)
    study = what_if.study_of(request, Model(request.model, stack, tokenizer, 0, 0, 0.0))
    influence = [a.value for a in study.influence() if isinstance(a, messages.LayerRated)]
    depth, chosen = len(stack.layers), sorted(run_set)
    lowest = sorted(sorted(range(depth), key=influence.__getitem__)[: len(chosen)])
    sets = [[], *([layer] for layer in range(depth)), *([chosen, lowest] if chosen else [])]
    return LayerRecord(
        model=request.model,
        model_fingerprint=recorded.model_fingerprint(catalog.locate(request.model)),
        text=request.text,
        heldout=request.heldout,
        seed=request.seed,
        text_fingerprints={"calibration": corpora.fingerprint(request.text),
                           "heldout": corpora.fingerprint(request.heldout)},
        block_fingerprints={domain: blocks.fingerprint(path.ids.tolist()) for domain, path in study.paths.items()},
        parameters=perplexity.parameter_bytes(loaded)[0],
        layer_parameters=[perplexity.parameter_bytes(layer)[0] for layer in stack.layers],
        prompt=request.prompt,
        sample_tokens=request.sample_tokens,
        sets=[_set(study, request, list(removed)) for removed in dict.fromkeys(map(tuple, sets))],
        influence=[_rounded(value) for value in influence],
        made_with=torch.__version__,
    )  # fmt: skip


def _set(study: LayerStudy, request: WhatIf, removed: list[int]) -> RecordedSet:
    (measured,) = (a for a in study.measure(removed) if isinstance(a, messages.SetMeasured))
    sample = study.sample(removed, request.prompt, request.sample_tokens)
    figures = {
        name: {domain: _rounded(value) for domain, value in getattr(measured, name).items()}
        for name in ("perplexity", "dense", "kl")
    }
    measured = replace(measured, **figures, layers_run=0, cached=True, seconds=0.0, recorded=True)
    return RecordedSet(measured, "".join(a.piece for a in sample if isinstance(a, messages.TokenGenerated)))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
