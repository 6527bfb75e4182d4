"""Several models on one prompt: they write in turns, a token each, and then each reads what the others wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trsp_core import formatting
from trsp_core.data import special_tokens
from trsp_core.errors import TrspError
from trsp_core.evaluation import generation
from trsp_core.models import tokenizer_check
from trsp_core.schema import messages
from trsp_core.schema.messages import Answer, Generate, Trace, Variant
from trsp_core.workbench import chat_template
from trsp_core.workbench.model_cache import Model, ModelCache

Answers = Iterator[Answer | None]  # None: no answer, but a good moment to stop


class Decoder:
    """Text from tokens that come one by one: a letter of several tokens comes with its last one."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0  # of `_ids`, whose text has been given out
        self._from = 0  # of `_ids`, where decoding starts: far enough back for spaces to come out right

    def add(self, token: int) -> str:
        """The text that `token` completes; "" in the middle of a letter."""
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._done])
        after = self._decode(self._ids[self._from :])
        if len(after) <= len(before) or after.endswith("�"):
            return ""
        self._from, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass
class _Column:
    """One model at work. Times are seconds of its own computing."""

    number: int
    model: Model
    prompt: Tensor  # (1, T)
    chat: bool
    stop: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    rest: float = 0.0

    def finished(self) -> messages.ColumnFinished:
        ended = bool(self.tokens) and self.tokens[-1] in self.stop
        return messages.ColumnFinished(
            column=self.number,
            tokens=len(self.tokens),
            reason="end" if ended else "length",
            prefill=self.prompt.shape[1] / self.first if self.first else 0.0,
            decode=(len(self.tokens) - 1) / self.rest if self.rest else 0.0,
        )


def stream(request: Generate, cache: ModelCache) -> Answers:
    """The answers to `request`: the models, their tokens in turns, and how likely each text is to each model."""
    columns: list[_Column] = []
    for number, model in _models(request.columns, cache):
        yield model.ready()
        ids, chat = encode(model, request.prompt, request.chat)
        refuse_length(model, ids.shape[1] + request.new_tokens)
        columns.append(_Column(number, model, ids, chat, ends(model)))
    for column in columns:
        yield messages.PromptRead(column.number, column.prompt.shape[1], column.chat)
    yield from _turns(request, columns)
    if request.trace:
        readers = [(c.model, c.prompt) for c in columns]
        for column in columns:
            if column.tokens:
                yield from read_along(column.number, column.tokens, readers)


def _models(variants: Sequence[Variant], cache: ModelCache) -> Iterator[tuple[int, Model]]:
    beside = {v.model for v in variants} | {v.base for v in variants}
    for number, variant in enumerate(variants):
        yield number, cache.take(variant, beside)


def _turns(request: Generate, columns: list[_Column]) -> Answers:
    """One token of each column in turn, until all are complete."""
    began = time.perf_counter()
    sampling = (request.new_tokens, request.temperature, request.top_p, request.seed)
    running = [(c, generation.tokens(c.model.stack.model, c.prompt, *sampling, c.stop), _decoder(c)) for c in columns]
    while running:
        for entry in list(running):
            column, tokens, decoder = entry
            turn = time.perf_counter()
            token = next(tokens, None)
            spent = time.perf_counter() - turn
            if token is None:
                running.remove(entry)
                yield column.finished()
                continue
            if column.tokens:
                column.rest += spent
            else:
                column.first = spent
            column.tokens.append(token)
            yield messages.TokenGenerated(
                column.number, token, decoder.add(token), round(time.perf_counter() - began, 3)
            )


def _decoder(column: _Column) -> Decoder:
    return Decoder(column.model.tokenizer)


def trace(request: Trace, cache: ModelCache) -> Answers:
    """One `TextTraced` for each model, of one text."""
    readers = []
    for _, model in _models(request.columns, cache):
        ids, _ = encode(model, request.prompt, request.chat)
        readers.append((model, ids))
    first = readers[0][0]
    tokens = first.tokenizer(request.text, add_special_tokens=False).input_ids
    if not tokens:
        raise TrspError("The text holds no token.", "Give a longer text.")
    tokenizer_check.refuse(tokens, first.stack.text_config.vocab_size, "The text")
    for model, ids in readers:
        refuse_length(model, ids.shape[1] + len(tokens))
    yield from read_along(0, tokens, readers)


def read_along(text: int, tokens: list[int], readers: list[tuple[Model, Tensor]]) -> Answers:
    """How likely each of `tokens` is to each model after its own prompt, and what it would have written instead. Models
    with another vocabulary than the text's are left out.

    Args:
        text: number of the column that wrote `tokens`.
        readers: each model with its prompt (1, T).
    """
    own = readers[text][0]
    pieces = pieces_of(own.tokenizer, tokens)
    reference: Tensor | None = None
    for column, (model, prompt) in enumerate(readers):
        yield None
        if not same_vocabulary(model, own) or max(tokens) >= model.stack.text_config.vocab_size:
            continue
        with torch.inference_mode():
            logs = log_probabilities(model, prompt, tokens)
            if column == 0:
                reference = logs
            kl = [] if reference is None else (reference.exp() * (reference - logs)).sum(-1).clamp(min=0).tolist()
            own_logs = logs.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
            best = logs.topk(min(messages.ALTERNATIVES, logs.shape[1]), dim=-1)
        yield messages.TextTraced(
            text=text,
            column=column,
            tokens=tokens,
            pieces=pieces,
            probabilities=_rounded(own_logs.exp()),
            alternatives=[[_piece(own.tokenizer, int(i)) for i in row] for row in best.indices],
            alternative_probabilities=[_rounded(row.exp()) for row in best.values],
            kl=[round(v, 6) for v in kl],
            nats=float(-own_logs.mean()),
        )


def log_probabilities(model: Model, prompt: Tensor, tokens: list[int]) -> Tensor:
    """(n, V) float32 on the CPU: log-probabilities at each of the n `tokens` after `prompt`."""
    ids = torch.cat([prompt, torch.tensor([tokens], device=prompt.device)], dim=1)
    logits = model.stack.model(input_ids=ids, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    return torch.log_softmax(logits.float().cpu(), dim=-1)


def encode(model: Model, prompt: str, chat: bool) -> tuple[Tensor, bool]:
    """Token ids (1, T) of `prompt`, and whether the chat template is around it.

    Raises:
        TrspError: no token comes out, one is beyond the embedding, or the template cannot be used.
    """
    tokenizer, device = model.tokenizer, next(model.stack.model.parameters()).device
    chat = chat and bool(getattr(tokenizer, "chat_template", None))
    if chat:
        text = chat_template.render(tokenizer, [{"role": "user", "content": prompt}])
        ids = tokenizer(text, add_special_tokens=False).input_ids
    else:
        ids = special_tokens.begun(tokenizer, prompt)
    if not ids:
        raise TrspError("The prompt holds no token.", "Write a prompt.")
    tokenizer_check.refuse(ids, model.stack.text_config.vocab_size, "The prompt")
    return torch.tensor([ids], device=device), chat


def refuse_length(model: Model, tokens: int) -> None:
    """Raise TrspError if `tokens` are more than the model can read."""
    most = model.stack.context
    if most and tokens > most:
        raise TrspError(
            f"Prompt and new text are {formatting.count(tokens)} tokens together, {model.name} reads "
            f"{formatting.count(most)}.",
            "Write a shorter prompt, or ask for fewer tokens.",
        )


def ends(model: Model) -> frozenset[int]:
    """Tokens that end a text, as the tokenizer and the model's generation config name them; what is no id ends none."""
    config = getattr(model.stack.model, "generation_config", None)
    entries = [getattr(config, "eos_token_id", None), getattr(model.tokenizer, "eos_token_id", None)]
    flat = [i for entry in entries for i in (entry if isinstance(entry, list | tuple) else [entry])]
    return frozenset(i for i in flat if isinstance(i, int))


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token completes; an end token by its name."""
    decoder, special = Decoder(tokenizer), set(tokenizer.all_special_ids)
    pieces = [decoder.add(token) for token in tokens]
    return [_piece(tokenizer, t) if t in special else piece for t, piece in zip(tokens, pieces, strict=True)]


def same_vocabulary(one: Model, other: Model) -> bool:
    """Whether token ids mean the same to both."""
    a, b = one.tokenizer, other.tokenizer
    return a is b or (len(a) == len(b) and a.get_vocab() == b.get_vocab())


def _piece(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def _rounded(values: Tensor) -> list[float]:
    return [float(format(v, ".4g")) for v in values.tolist()]
