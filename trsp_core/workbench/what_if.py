"""What a set of removed layers costs. It is computed from the lowest change upwards, and states that were computed for
earlier sets are kept as far as memory goes (`perf.activation_cache`)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator

from trsp_core.data import blocks
from trsp_core.errors import TrspError
from trsp_core.evaluation import generation, perplexity
from trsp_core.evaluation.layer_removal import STATE_BYTES, Figures, Path
from trsp_core.models import tokenizer_check
from trsp_core.perf import parallel
from trsp_core.perf.replicas import view
from trsp_core.schema import messages
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import DOMAINS
from trsp_core.schema.messages import Answer, Importance, Influence, Prepare, WhatIf
from trsp_core.workbench.model_cache import Model, without
from trsp_core.workbench.side_by_side import Decoder, encode, ends

MOST_STUDIES = 2  # pairs of texts for each model
Answers = Iterator[Answer | None]


class LayerStudy:
    """One model on both domains' quick texts, a block of each, and the sets tried on it.

    Attributes:
        paths: of each domain, on a view of the model, so that both can be walked at once.
    """

    def __init__(self, model: Model, config: RunConfig):
        self.model = model
        texts = blocks.prepare(config, model.tokenizer)
        for domain, ids in texts.measure.items():
            tokenizer_check.refuse(
                [int(ids.max())], model.stack.text_config.vocab_size, f"The text {texts.names[domain]}"
            )
        self.device = next(model.stack.model.parameters()).device
        self.paths = {
            domain: Path(view(model.stack), texts.measure[domain][:1].to(self.device), STATE_BYTES // len(DOMAINS))
            for domain in DOMAINS
        }
        self._sizes = [perplexity.parameter_bytes(layer)[0] for layer in model.stack.layers]
        self._parameters = perplexity.parameter_bytes(model.stack.model)[0]
        self._samples: dict[tuple, str] = {}

    def measure(self, removed: list[int]) -> Answers:
        """One `SetMeasured`, after a moment at which it can be stopped.

        Raises:
            TrspError: a layer that does not exist, or all of them.
        """
        n_layers, off = len(self._sizes), frozenset(removed)
        if not off < frozenset(range(n_layers)):
            raise TrspError(
                f"Layers {sorted(off)} cannot be removed: this model has layers 0 to {n_layers - 1}.",
                "Leave at least one layer, and name layers that exist.",
            )
        began = time.perf_counter()
        cached = self.known(off)
        yield None
        figures, dense = self.figures(off), self.figures(frozenset())
        yield messages.SetMeasured(
            removed=sorted(off),
            n_layers=n_layers,
            perplexity={d: perplexity.perplexity([f.loss]) for d, f in figures.items()},
            dense={d: perplexity.perplexity([f.loss]) for d, f in dense.items()},
            kl={d: f.kl for d, f in figures.items()},
            tokens=self.paths[DOMAINS[0]].ids.shape[1] - 1,
            parameters=self._parameters - sum(self._sizes[i] for i in off),
            parameters_dense=self._parameters,
            ceiling=n_layers / (n_layers - len(off)),
            layers_run=0 if cached else sum(f.layers_run for f in figures.values()),
            cached=cached,
            seconds=round(time.perf_counter() - began, 4),
        )

    def sample(self, removed: list[int], prompt: str, new_tokens: int) -> Answers:
        """The likeliest continuation of `prompt` without the layers `removed`, token by token; a known one at once."""
        key = (frozenset(removed), prompt, new_tokens)
        if key in self._samples:
            yield messages.TokenGenerated(0, -1, self._samples[key], 0.0)
            return
        thinned = without(self.model, removed) if removed else self.model
        ids, _ = encode(self.model, prompt, chat=False)
        read, most_tokens = generation.fitted(self.model.stack.context, ids.shape[1], new_tokens)
        decoder, text, began = Decoder(self.model.tokenizer), "", time.perf_counter()
        for token in generation.tokens(thinned.stack.model, ids[:, -read:], most_tokens, stop=ends(self.model)):
            piece = decoder.add(token)
            text += piece
            yield messages.TokenGenerated(0, token, piece, round(time.perf_counter() - began, 3))
        self._samples[key] = text

    def importance(self) -> Answers:
        """How much the loss rises when one layer is left out: the mean of both domains, from the last layer down."""
        for layer in reversed(range(len(self._sizes))):
            yield None
            yield messages.LayerRated(layer, self._loss(frozenset([layer])) - self._loss(frozenset()))

    def influence(self) -> Answers:
        """Block influence of each layer: the mean of both domains."""
        for layer in range(len(self._sizes)):
            yield messages.LayerRated(
                layer, math.fsum(p.influence(layer) for p in self.paths.values()) / len(self.paths)
            )
            yield None

    def known(self, removed: frozenset[int]) -> bool:
        return all(path.known(removed) for path in self.paths.values())

    def figures(self, removed: frozenset[int]) -> dict[str, Figures]:
        """Loss and KL without the layers `removed`, by domain."""
        tasks = [functools.partial(path.figures, removed) for path in self.paths.values()]
        figures = [task() for task in tasks] if self.known(removed) else parallel.run(tasks, self.device)
        return dict(zip(self.paths, figures, strict=True))

    def _loss(self, removed: frozenset[int]) -> float:
        return math.fsum(f.loss for f in self.figures(removed).values()) / len(self.paths)


def study_of(request: WhatIf | Importance | Influence | Prepare, model: Model) -> LayerStudy:
    """The study of `model` on the texts of `request`, in blocks that it can read; kept with the model."""
    key = (request.text, request.heldout, request.seed)
    if key not in model.studies:
        config = RunConfig(
            text=request.text,
            heldout=request.heldout,
            seed=request.seed,
            measure_blocks=1,
            measure_length=min(messages.QUICK_TOKENS, model.stack.context or messages.QUICK_TOKENS),
            calibration_blocks=1,
            block_length=8,
        )
        while len(model.studies) >= MOST_STUDIES:
            model.studies.popitem(last=False)
        model.studies[key] = LayerStudy(model, config)
    model.studies.move_to_end(key)
    return model.studies[key]
