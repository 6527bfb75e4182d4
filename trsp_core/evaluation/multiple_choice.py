"""Lets a model answer questions by likelihood: it chooses the continuation that is most probable to it, in all or a
byte.

plain: argmax over choices of  log p(continuation | context)
by bytes: argmax of  log p(continuation | context) / bytes of the continuation
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trsp_core.data import special_tokens
from trsp_core.evaluation import intervals
from trsp_core.evaluation.intervals import Interval
from trsp_core.evaluation.questions import Question
from trsp_core.models import tokenizer_check

AT_ONCE = 8  # sequences in a pass


@dataclass(frozen=True)
class AnsweredQuestion:
    """How a model has answered one question. Choices are counted from 0.

    Attributes:
        chosen, chosen_by_bytes: the choices it has made; of a single choice -1 if it would write something else.
        gold: the right choice.
        nats: the log-likelihood of each choice.
    """

    chosen: int
    chosen_by_bytes: int
    gold: int
    nats: tuple[float, ...]


def answer(model: nn.Module, tokenizer: Any, questions: Sequence[Question], longest: int) -> Iterator[AnsweredQuestion]:
    """Let the model answer the questions, and yield one `AnsweredQuestion` for each, in order.

    Args:
        longest: the most tokens that the model reads; of a longer question only the end is read.
    """
    device = next(model.parameters()).device
    for question in questions:
        pairs = [encode(tokenizer, *pair) for pair in zip(question.contexts, question.continuations, strict=True)]
        likelihoods: list[tuple[float, bool]] = []
        for start in range(0, len(pairs), AT_ONCE):
            likelihoods += _likelihoods(model, pairs[start : start + AT_ONCE], longest, device)
        nats = [value for value, _ in likelihoods]
        if len(nats) == 1:
            chosen = by_bytes = 0 if likelihoods[0][1] else -1
        else:
            sizes = [len(c.strip().encode()) for c in question.continuations]
            chosen = max(range(len(nats)), key=lambda i: nats[i])
            by_bytes = max(range(len(nats)), key=lambda i: nats[i] / max(sizes[i], 1))
        yield AnsweredQuestion(chosen, by_bytes, question.gold, tuple(nats))


def refuse(tokenizer: Any, questions: Sequence[Question], rows: int) -> None:
    """Raise TrspError if a token of the `questions` has no row in an embedding with `rows` rows."""
    if tokenizer_check.highest(tokenizer) >= rows:  # else none can have
        for number, question in enumerate(questions, 1):
            for pair in zip(question.contexts, question.continuations, strict=True):
                tokenizer_check.refuse(encode(tokenizer, *pair)[0], rows, f"Question {number}")


def encode(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """The token ids of context and continuation together, begun as the tokenizer begins a text, and how many of them
    are the continuation's: those that the context alone does not have."""
    before, whole = (special_tokens.begun(tokenizer, text) for text in (context, context + continuation))
    return whole, max(len(whole) - len(before), 1)


def _likelihoods(
    model: nn.Module, pairs: list[tuple[list[int], int]], longest: int, device: torch.device
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation in nats, and whether each of its tokens is the likeliest.

    Args:
        pairs: what `encode` returns. Sequences are padded on the right, which a causal model does not see.
        longest: the most tokens that the model reads.
    """
    cut = [(ids[-longest:], min(n, longest - 1)) for ids, n in pairs]
    width = max(len(ids) for ids, _ in cut)
    sequences = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in cut], device=device)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=sequences, use_cache=False).logits
        likelihoods = []
        for i, (ids, n) in enumerate(cut):
            logs = logits[i, len(ids) - n - 1 : len(ids) - 1].float().log_softmax(-1)  # (n, V)
            targets = sequences[i, len(ids) - n : len(ids)]
            value = logs.gather(1, targets[:, None]).double().sum().item()
            likelihoods.append((value, bool((logs.argmax(-1) == targets).all())))
        return likelihoods


def accuracy(answers: Sequence[AnsweredQuestion]) -> tuple[Interval, Interval]:
    """The share of right answers with Wilson's interval, by the plain choices and by those by bytes.

    Raises:
        ValueError: no answers.
    """
    right = sum(a.chosen == a.gold for a in answers), sum(a.chosen_by_bytes == a.gold for a in answers)
    return intervals.share(right[0], len(answers)), intervals.share(right[1], len(answers))
