"""Finds the special tokens that a tokenizer puts before and after each text by default, such as BOS and EOS.

Whatever a model reads here (blocks, questions, prompts) begins with those before a text, and does not end with those
after it, since more follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trsp_core.errors import TrspError

Encode = Callable[[str, bool], list[int]]  # token ids of a text, with the special tokens around it or without
PROBES = ("a", "A", "1")  # texts to try it on, one after the other: some tokenizers know few letters


def encoder(tokenizer: Any) -> Encode:
    """The `Encode` of a tokenizer of transformers."""
    return lambda text, around: tokenizer(text, add_special_tokens=around, verbose=False).input_ids


def around(encode: Encode) -> tuple[list[int], list[int]]:
    """The ids of the special tokens before a text, and of those after it: for `<s> text </s>`, `([1], [2])`.

    Raises:
        TrspError: they cannot be told, since the ids of the text itself are others when special tokens stand around it.
    """
    for probe in PROBES:
        ids, inner = encode(probe, True), encode(probe, False)
        for start in range(len(ids) - len(inner) + 1):
            if inner and ids[start : start + len(inner)] == inner:
                return ids[:start], ids[start + len(inner) :]
    if not encode("", True):
        return [], []
    raise TrspError(
        "How this model's tokenizer begins a text cannot be told from how it writes one letter.",
        "Choose a model whose tokenizer writes a text in the same way with BOS and EOS as without.",
    )


def begun(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that goes on: with the special tokens before it, and without those after it."""
    encode = encoder(tokenizer)
    _, after = around(encode)
    ids = encode(text, True)
    return ids[: len(ids) - len(after)] if after and ids[-len(after) :] == after else ids
