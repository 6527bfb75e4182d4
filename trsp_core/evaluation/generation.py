"""Generates text, token by token, with a cache of keys and values. Whoever reads it can stop after any token."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trsp_core.data import special_tokens
from trsp_core.surgery import hooks

PIECES = 16  # into which a matrix is cut for a pass of one token
LARGE = 2**21  # numbers of a matrix from which on all cores are worth waking

CACHES = ("past_key_values", "cache_params", "state")  # what models call their cache


def tokens(
    model: nn.Module,
    prompt: Tensor,
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield up to `new_tokens` token ids that follow `prompt` (1, T).

    Args:
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn, the higher the more evenly.
        top_p: draw only among the likeliest tokens that together have this share of the probability.
        seed: of the draws; the same seed on the same logits draws the same tokens.
        stop: token ids that end the text; the one that ends it is yielded too.
    """
    draw = torch.Generator().manual_seed(seed)
    ids, cache, maps = prompt, {}, single_token_maps(model)
    for _ in range(new_tokens):
        lone = bool(maps) and ids.shape[1] == 1
        with torch.inference_mode(), hooks.forwarding(maps if lone else {}), _cores(1 if lone else None):
            output = model(input_ids=ids, use_cache=True, **cache)
            cache = {name: output[name] for name in CACHES if name in output}
            token = choose(output.logits[0, -1], temperature, top_p, draw)
            new = torch.full_like(prompt[:, :1], token)
            ids = new if cache else torch.cat([ids, new], dim=1)  # a model without a cache reads all of it again
        yield token
        if token in stop:
            return


def single_token_maps(model: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """A faster forward function for passes of a single token, by linear layer, for each layer that allows it.

    With a cache, a pass takes as long as reading the weights. torch's product of a float32 matrix and one vector reads
    at half the rate of a core. Its product of a batch of the matrix's pieces reads at the whole rate, and at that of
    all cores where the matrix is large; for smaller ones waking the cores costs more than it saves.
    """
    linear_maps = [
        m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m) and _splits(m.weight)
    ]
    cores = torch.get_num_threads()
    return {
        m: partial(
            _single_token,
            m.weight.unflatten(0, (math.gcd(len(m.weight), PIECES), -1)),
            m.bias,
            cores if m.weight.numel() > LARGE else None,
        )
        for m in linear_maps
    }


@contextlib.contextmanager
def _cores(count: int | None) -> Iterator[None]:
    """Inside, products are shared among `count` cores; None changes nothing."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _splits(weight: Tensor) -> bool:
    """Whether a weight can be cut into equal pieces of rows for `_single_token`."""
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and math.gcd(len(weight), PIECES) > 1


def _single_token(pieces: Tensor, bias: Tensor | None, cores: int | None, x: Tensor) -> Tensor:
    """`x` (..., D) through a linear map whose weight is given in `pieces` (P, out / P, D), on `cores` cores (None for
    as many as are set). More than one vector goes through it as usual."""
    if x.numel() != pieces.shape[-1]:
        return F.linear(x, pieces.flatten(0, 1), bias)
    # the vector has to stay contiguous: with other strides torch takes a way that is five times slower
    with _cores(cores):
        out = torch.bmm(pieces, x.reshape(1, -1).T.expand(len(pieces), -1, 1)).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def choose(logits: Tensor, temperature: float, top_p: float, draw: torch.Generator) -> int:
    """One token id from `logits` (V,): the likeliest at temperature 0, else drawn within `top_p`."""
    if temperature <= 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    ranked, order = probabilities.sort(descending=True)
    ranked[ranked.cumsum(0) - ranked > top_p] = 0  # the first token always stays
    return int(order[torch.multinomial(ranked / ranked.sum(), 1, generator=draw)])


def fitted(context: int | None, read: int, new_tokens: int) -> tuple[int, int]:
    """How many tokens to read and how many to write, so that both fit into `context` tokens together. If `read` and
    `new_tokens`, the wanted numbers, do not, fewer are written, down to half the context, and then fewer are read. A
    `context` of None has no limit."""
    if context is None:
        return read, new_tokens
    new_tokens = min(new_tokens, max(context - read, context // 2))
    return min(read, context - new_tokens), new_tokens


def continuation(
    model: nn.Module, tokenizer: Any, prompt: str, new_tokens: int, context: int | None = None
) -> tuple[str, str]:
    """`(prompt, text)`: the prompt as it was read, which is only its end where not all of it fits, and the likeliest
    continuation of it.

    Args:
        context: the most tokens that both may be together; None for no limit.
    """
    ids = torch.tensor([special_tokens.begun(tokenizer, prompt)], device=next(model.parameters()).device)
    read, most_tokens = fitted(context, ids.shape[1], new_tokens)
    if read < ids.shape[1]:
        opening = min(len(special_tokens.around(special_tokens.encoder(tokenizer))[0]), read - 1)
        prompt = tokenizer.decode(ids[0, opening - read :])
        ids = torch.cat([ids[:, :opening], ids[:, opening - read :]], dim=1)
    return prompt, tokenizer.decode(list(tokens(model, ids, most_tokens)), skip_special_tokens=True)
