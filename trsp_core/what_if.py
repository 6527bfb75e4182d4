"""What a set of removed layers costs, computed from the lowest change upwards: states that were computed for earlier
sets are kept as far as memory goes (`states`)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from trsp_core import abreast, data, generate, heads, measure, vocabulary
from trsp_core import answers as an
from trsp_core.answers import Answer, Importance, Influence, WhatIf
from trsp_core.columns import Decoder, encode, ends
from trsp_core.config import RunConfig
from trsp_core.errors import TrspError
from trsp_core.events import DOMAINS
from trsp_core.heads import Reference
from trsp_core.shelf import Model, without
from trsp_core.states import States, key
from trsp_core.surgery import Stack
from trsp_core.views import view

STATE_BYTES = 600_000_000  # of kept hidden states, over both domains
MOST_STUDIES = 2  # pairs of texts for each model
Answers = Iterator[Answer | None]


@dataclass(frozen=True)
class Figures:
    """Of one set on a text: mean nats a predicted token, mean KL from the dense model, layers that were computed."""

    loss: float
    kl: float
    layers_run: int


class Path:
    """A text's way through the layers, for any set of removed layers.

    Attributes:
        ids: (B, T) token ids, on the model's device.
        states: what was computed on the way.
    """

    def __init__(self, stack: Stack, ids: Tensor, most_bytes: int = STATE_BYTES):
        self.stack, self.ids, self.most_bytes = stack, ids, most_bytes
        self.states = States(ids)
        self._tried: dict[frozenset[int], Figures] = {}
        self._dense: Reference | None = None

    def figures(self, removed: frozenset[int]) -> Figures:
        """Loss and KL without `removed`; the first call measures the dense model too."""
        if self._dense is None:
            self._dense, layers_run = self._refer()
            self._tried[frozenset()] = self._compared(self._dense, self._dense.dense, layers_run)
        if removed not in self._tried:
            with heads.withheld(self.stack.model) if self._dense.plain else nullcontext() as given:
                logits, layers_run = self._logits(removed)
            states = logits if given is None else given[0][:, :-1].flatten(0, 1)
            self._tried[removed] = self._compared(self._dense, states, layers_run)
        return self._tried[removed]

    def _compared(self, dense: Reference, states: Tensor, layers_run: int) -> Figures:
        loss, kl = (x.mean().item() for x in dense.compare(states, self._targets))
        return Figures(loss, max(kl, 0.0), layers_run)

    def known(self, removed: frozenset[int]) -> bool:
        return removed in self._tried

    def start(self, removed: frozenset[int]) -> int:
        """The highest layer whose entering state for this set is kept; 0 where none is."""
        return self.states.start(removed, len(self.stack.layers))

    def influence(self, layer: int) -> float:
        """1 - mean cosine of X_in and X_out of `layer` in the dense model."""
        self.figures(frozenset())
        states = [self.states.kept[key(i, frozenset())] for i in (layer, layer + 1)]
        return float(1 - F.cosine_similarity(states[0], states[1], dim=-1).mean())

    @property
    def _targets(self) -> Tensor:
        return self.ids[:, 1:].flatten()

    def _refer(self) -> tuple[Reference, int]:
        """What the dense model says, and how many layers were computed for it."""
        with heads.listening(self.stack.model) as given:
            logits, layers_run = self._logits(frozenset())
        return Reference(self.stack.model, given[0][:, :-1].flatten(0, 1) if given else None, logits), layers_run

    def _logits(self, removed: frozenset[int]) -> tuple[Tensor, int]:
        """What the model puts out at the N = B (T - 1) places that predict a token, (N, V) where its head is not
        withheld, and how many layers were computed."""
        given, layers_run = self.states.climb(self.stack, removed)
        size = next(iter(self.states.kept.values())).nbytes
        dense = len(self.stack.layers) + 1  # states of the dense model, which always stay
        self.states.bound(max(self.most_bytes // size, dense + 2))
        return given[:, :-1].flatten(0, 1), layers_run


class Study:
    """One model on both domains' quick texts, a block of each, and the sets tried on it.

    Attributes:
        paths: of each domain, on a view of the model, so that both can be walked at once.
    """

    def __init__(self, model: Model, config: RunConfig):
        self.model = model
        texts = data.prepare(config, model.tokenizer)
        for domain, blocks in texts.measure.items():
            vocabulary.refuse(
                [int(blocks.max())], model.stack.text_config.vocab_size, f"The text {texts.names[domain]}"
            )
        self.device = next(model.stack.model.parameters()).device
        self.paths = {
            domain: Path(view(model.stack), texts.measure[domain][:1].to(self.device), STATE_BYTES // len(DOMAINS))
            for domain in DOMAINS
        }
        self._sizes = [measure.parameter_bytes(layer)[0] for layer in model.stack.layers]
        self._parameters = measure.parameter_bytes(model.stack.model)[0]
        self._samples: dict[tuple, str] = {}

    def measure(self, removed: list[int]) -> Answers:
        """One `SetMeasured`; a moment to stop before it.

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
        found, dense = self.figures(off), self.figures(frozenset())
        yield an.SetMeasured(
            removed=sorted(off),
            n_layers=n_layers,
            perplexity={d: measure.perplexity([f.loss]) for d, f in found.items()},
            dense={d: measure.perplexity([f.loss]) for d, f in dense.items()},
            kl={d: f.kl for d, f in found.items()},
            tokens=self.paths[DOMAINS[0]].ids.shape[1] - 1,
            parameters=self._parameters - sum(self._sizes[i] for i in off),
            parameters_dense=self._parameters,
            ceiling=n_layers / (n_layers - len(off)),
            layers_run=0 if cached else sum(f.layers_run for f in found.values()),
            cached=cached,
            seconds=round(time.perf_counter() - began, 4),
        )

    def sample(self, removed: list[int], prompt: str, new_tokens: int) -> Answers:
        """The likeliest continuation of `prompt` without `removed`, a token at a time; a known one at once."""
        key = (frozenset(removed), prompt, new_tokens)
        if key in self._samples:
            yield an.TokenGenerated(0, -1, self._samples[key], 0.0)
            return
        thinned = without(self.model, removed) if removed else self.model
        ids, _ = encode(self.model, prompt, chat=False)
        read, written = generate.fitted(self.model.stack.context, ids.shape[1], new_tokens)
        decoder, text, began = Decoder(self.model.tokenizer), "", time.perf_counter()
        for token in generate.tokens(thinned.stack.model, ids[:, -read:], written, stop=ends(self.model)):
            piece = decoder.add(token)
            text += piece
            yield an.TokenGenerated(0, token, piece, round(time.perf_counter() - began, 3))
        self._samples[key] = text

    def importance(self) -> Answers:
        """How much the loss rises when a layer alone is left out, in the mean of both domains; from the top down."""
        for layer in reversed(range(len(self._sizes))):
            yield None
            yield an.LayerRated(layer, self._loss(frozenset([layer])) - self._loss(frozenset()))

    def influence(self) -> Answers:
        """Block influence of each layer, in the mean of both domains."""
        for layer in range(len(self._sizes)):
            yield an.LayerRated(layer, math.fsum(p.influence(layer) for p in self.paths.values()) / len(self.paths))
            yield None

    def known(self, removed: frozenset[int]) -> bool:
        return all(path.known(removed) for path in self.paths.values())

    def figures(self, removed: frozenset[int]) -> dict[str, Figures]:
        """Of each domain."""
        tasks = [functools.partial(path.figures, removed) for path in self.paths.values()]
        found = [task() for task in tasks] if self.known(removed) else abreast.run(tasks, self.device)
        return dict(zip(self.paths, found, strict=True))

    def _loss(self, removed: frozenset[int]) -> float:
        return math.fsum(f.loss for f in self.figures(removed).values()) / len(self.paths)


def study_of(request: WhatIf | Importance | Influence, model: Model) -> Study:
    """The study of `model` on the texts of `request`, in blocks that it can read; kept with the model."""
    key = (request.text, request.heldout, request.seed)
    if key not in model.studies:
        config = RunConfig(
            text=request.text,
            heldout=request.heldout,
            seed=request.seed,
            measure_blocks=1,
            measure_length=min(an.QUICK_TOKENS, model.stack.context or an.QUICK_TOKENS),
            calibration_blocks=1,
            block_length=8,
        )
        while len(model.studies) >= MOST_STUDIES:
            model.studies.popitem(last=False)
        model.studies[key] = Study(model, config)
    model.studies.move_to_end(key)
    return model.studies[key]
