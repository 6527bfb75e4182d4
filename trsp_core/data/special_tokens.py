"""How a tokenizer begins a text and closes it: what it puts around each one by default. Whatever reads a model's text
begins as here (blocks, questions, prompts), and none of it ends as a closed text does: more follows.

A tokenizer is known here by `Encode`: a text, and whether what belongs around it comes too, to token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trsp_core.errors import TrspError

Encode = Callable[[str, bool], list[int]]
PROBES = ("a", "A", "1")  # a text of a letter; some tokenizers know few


def encoder(tokenizer: Any) -> Encode:
    """`Encode` of a tokenizer of transformers."""
    return lambda text, around: tokenizer(text, add_special_tokens=around, verbose=False).input_ids


def around(encode: Encode) -> tuple[list[int], list[int]]:
    """What stands before each text and after it: `<s> $A </s>` gives `([1], [2])`.

    Raises:
        TrspError: the tokenizer writes the text itself otherwise where something stands around it.
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
    """Token ids of a text that goes on: begun as the tokenizer begins one, and not closed."""
    encode = encoder(tokenizer)
    _, after = around(encode)
    ids = encode(text, True)
    return ids[: len(ids) - len(after)] if after and ids[-len(after) :] == after else ids
