"""Text, token by token: one cached step at a time, so that whoever reads can stop after any token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

CACHES = ("past_key_values", "cache_params", "state")  # what models call the memory of what they have read


def tokens(
    model: nn.Module,
    prompt: Tensor,
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Up to `new_tokens` token ids that follow `prompt` (1, T), with a key-value cache.

    Args:
        temperature: 0 takes the likeliest token; above, tokens are drawn, flatter with a higher value.
        top_p: draw among the likeliest tokens that hold this share of the probability.
        seed: of the draw; the same seed on the same logits draws the same tokens.
        stop: ids that end the text; the one that did is yielded too.
    """
    draw = torch.Generator().manual_seed(seed)
    ids, cache = prompt, {}
    for _ in range(new_tokens):
        with torch.inference_mode():
            output = model(input_ids=ids, use_cache=True, **cache)
            cache = {name: output[name] for name in CACHES if name in output}
            token = choose(output.logits[0, -1], temperature, top_p, draw)
            new = torch.full_like(prompt[:, :1], token)
            ids = new if cache else torch.cat([ids, new], dim=1)  # a model without a cache reads all of it again
        yield token
        if token in stop:
            return


def choose(logits: Tensor, temperature: float, top_p: float, draw: torch.Generator) -> int:
    """One token id from `logits` (V,): the likeliest at temperature 0, else drawn within `top_p`."""
    if temperature <= 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    ranked, order = probabilities.sort(descending=True)
    ranked[ranked.cumsum(0) - ranked > top_p] = 0  # the first token always stays
    return int(order[torch.multinomial(ranked / ranked.sum(), 1, generator=draw)])


def continuation(model: nn.Module, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """The likeliest continuation of `prompt` as text, without the prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(next(model.parameters()).device)
    return tokenizer.decode(list(tokens(model, ids, new_tokens)), skip_special_tokens=True)
