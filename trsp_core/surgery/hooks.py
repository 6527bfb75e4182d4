"""Contexts that change or watch what layers compute, each for as long as it is open."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from trsp_core.surgery.stack import Stack


def entering(args: tuple, kwargs: dict) -> Any:
    """X_in (B, T, D), the hidden states among the arguments that a layer was called with."""
    return args[0] if args else kwargs.get("hidden_states")


def hidden_of(output: Any) -> Any:
    """X_out (B, T, D), the hidden states in what a layer returned."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a layer returned, with `hidden` (B, T, D) in place of its hidden states."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextlib.contextmanager
def gated(stack: Stack, weights: Tensor, kind: str, layers: Collection[int]) -> Iterator[None]:
    """Inside, each layer i of `layers` hands on its output weighted by s_i (paper, figure 2).

    Args:
        weights: s (L,), float32; gradients flow into it.
        kind: "branch" hands on X_in + s_i (X_out - X_in), exactly X_out at s_i = 1 and X_in at 0; "output" s_i X_out.
    """

    def make(i: int) -> Any:
        def gate(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            x_out = hidden_of(output)
            x_in = entering(args, kwargs).to(x_out.device)  # a layer may be the first on its GPU
            # Not in the states' format: in bfloat16, numbers just below 1 are 0.004 apart, more than a step moves s.
            wide = torch.promote_types(x_out.dtype, weights.dtype)
            s = weights[i].to(x_out.device, wide)
            gated = torch.lerp(x_in.to(wide), x_out.to(wide), s) if kind == "branch" else s * x_out.to(wide)
            return with_hidden(output, gated.to(x_out.dtype))

        return gate

    hooks = [stack.layers[i].register_forward_hook(make(i), with_kwargs=True) for i in sorted(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def skipped(
    stack: Stack, layers: Collection[int], instead: Mapping[int, Tensor] = MappingProxyType({})
) -> Iterator[None]:
    """Inside, the layers in `layers` compute nothing and hand on their input. Call the model with `use_cache=False`.

    Args:
        instead: hidden states (B, T, D) that a skipped layer hands on instead of its input, by layer.
    """

    def make(i: int) -> Any:
        def hand_on(*args: Any, **kwargs: Any) -> Any:
            hidden = instead[i] if i in instead else entering(args, kwargs)
            return hidden if stack.extras is None else (hidden, *[None] * stack.extras)

        return hand_on

    with forwarding({stack.layers[i]: make(i) for i in sorted(layers)}):
        yield


@contextlib.contextmanager
def forwarding(forwards: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Inside, each module in `forwards` computes by the function that is given for it."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextlib.contextmanager
def tapped(stack: Stack, layers: Sequence[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """A dict that each pass inside fills anew: layer to its (X_in, X_out), each (B, T, D), in the autograd graph."""
    taps: dict[int, tuple[Tensor, Tensor]] = {}

    def make(i: int) -> Any:
        def tap(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            x_out = hidden_of(output)
            taps[i] = (entering(args, kwargs).to(x_out.device), x_out)

        return tap

    hooks = [stack.layers[i].register_forward_hook(make(i), with_kwargs=True) for i in layers]
    try:
        yield taps
    finally:
        taps.clear()
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def heard(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list to which each call of `module` inside adds its input (B, T, F) and its output (B, T, D), as a pair."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _module, args, output: calls.append((args[0], hidden_of(output))))
    try:
        yield calls
    finally:
        hook.remove()
