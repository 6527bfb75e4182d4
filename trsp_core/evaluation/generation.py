"""Text, token by token, with a cache: whoever reads can stop after any token."""

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

PIECES = 16  # of a matrix that one token goes through
LARGE = 2**21  # numbers of a matrix that is worth waking other cores for

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
    """A faster forward for one token, of each linear map of the model that allows it. With a cache the time goes into
    reading the weights. torch's product of a float32 matrix and one vector reads at half of a core's rate, that of a
    batch of its pieces at the whole rate, and, where the matrix is large, at that of all cores. For smaller ones waking
    the cores costs more than it saves."""
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
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and math.gcd(len(weight), PIECES) > 1


def _single_token(pieces: Tensor, bias: Tensor | None, cores: int | None, x: Tensor) -> Tensor:
    """x (..., D) through a map whose weight is in `pieces` (P, out / P, D), on `cores`."""
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
    """How many tokens to read and to write where `read` and `new_tokens` are wanted, so that both fit into `context`
    together: first fewer are written, down to half of it, then fewer are read. None is a context without end."""
    if context is None:
        return read, new_tokens
    new_tokens = min(new_tokens, max(context - read, context // 2))
    return min(read, context - new_tokens), new_tokens


def continuation(
    model: nn.Module, tokenizer: Any, prompt: str, new_tokens: int, context: int | None = None
) -> tuple[str, str]:
    """The likeliest continuation of `prompt` as text, without the prompt; and the prompt as it was read: its end, where
    not all of it fits.

    Args:
        context: the most tokens that prompt and continuation may be together.
    """
    ids = torch.tensor([special_tokens.begun(tokenizer, prompt)], device=next(model.parameters()).device)
    read, most_tokens = fitted(context, ids.shape[1], new_tokens)
    if read < ids.shape[1]:
        opening = min(len(special_tokens.around(special_tokens.encoder(tokenizer))[0]), read - 1)
        prompt = tokenizer.decode(ids[0, opening - read :])
        ids = torch.cat([ids[:, :opening], ids[:, opening - read :]], dim=1)
    return prompt, tokenizer.decode(list(tokens(model, ids, most_tokens)), skip_special_tokens=True)
