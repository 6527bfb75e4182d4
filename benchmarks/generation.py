"""Writing text: our token loop over transformers' `generate` on the same model; pruned over dense beside L/(L-K)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks import Row, row
from trsp_core.evaluation import perplexity
from trsp_core.models import loading
from trsp_core.schema import messages as an
from trsp_core.surgery.discovery import find
from trsp_core.workbench import side_by_side
from trsp_core.workbench.model_cache import Model, ModelCache, without

MODEL = "smollm2-135m"
PROMPT = (
    "Once upon a time, in a small town by the sea, there lived a clockmaker who repaired every clock but his own. " * 2
)
REMOVED = [12, 13, 14, 15, 16, 17, 18]
NEW, REPEATS = 48, 15


def run() -> Iterator[Row]:
    """Each repeat times all of them in turn, so that a change of the machine's pace meets all."""
    model, tokenizer = loading.load(MODEL, device="cpu")
    whole = Model(MODEL, find(model), tokenizer, 0, 0, 0.0)
    thin = without(whole, REMOVED)
    cache = ModelCache(device="cpu")
    cache.models[MODEL] = whole
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, :40]
    to_generate, to_dense, first, rates = [], [], [], []
    ours(cache, tokenizer.decode(ids[0]))  # warm up
    theirs(model, ids)
    for _ in range(REPEATS):
        wait, rate = ours(cache, tokenizer.decode(ids[0]))
        to_generate.append(rate / theirs(model, ids))
        first.append(wait)
        rates.append(rate)
        dense, pruned = (perplexity.time_once(m.stack.model, ids, NEW)[1] for m in (whole, thin))
        to_dense.append(pruned / dense)
    ceiling = len(whole.stack.layers) / len(thin.stack.layers)
    facts = {
        "tokens_per_second_median": round(statistics.median(rates), 1),
        "first_token_seconds_median": round(statistics.median(first), 3),
        "prompt_tokens": ids.shape[1],
        "new_tokens": NEW,
        "threads": torch.get_num_threads(),
    }
    yield row("generation", to_generate, 1.0, "higher", **facts)
    yield row("first_token_seconds", first, 0.5, "lower", **facts)
    removed = {"removed_layers": len(REMOVED), "ceiling": round(ceiling, 3)}
    yield row("pruned over dense decode, over L/(L-K)", [x / ceiling for x in to_dense], 0.95, "higher", **removed)


def ours(cache: ModelCache, prompt: str) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second in all, as the workbench answers."""
    ask = an.Generate([an.Variant(MODEL)], prompt, new_tokens=NEW, trace=False)
    began, count, first = time.perf_counter(), 0, 0.0
    for answer in side_by_side.stream(ask, cache):
        if isinstance(answer, an.TokenGenerated):
            first = first or time.perf_counter() - began
            count += 1
    return first, count / (time.perf_counter() - began)


def theirs(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Tokens per second of `model.generate`."""
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    return (out.shape[1] - ids.shape[1]) / (time.perf_counter() - began)
