"""Makes the passes of layers cheaper: in memory by computing again, in time by compiling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trsp_core.errors import TrspError
from trsp_core.surgery.hooks import forwarding
from trsp_core.surgery.stack import Stack


@contextlib.contextmanager
def recomputed(stack: Stack) -> Iterator[None]:
    """Inside, a backward pass computes each layer once more from its input, so that nothing inside the layer is kept
    from the forward pass (gradient checkpointing, arXiv:1604.06174). Gates and taps see what they always see."""

    def make(forward: Any) -> Any:
        def again(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return again

    with forwarding({layer: make(layer.forward) for layer in stack.layers}):
        yield


@contextlib.contextmanager
def fused(stack: Stack, backend: str = "inductor") -> Iterator[None]:
    """Inside, each layer is compiled for passes with gradients: on a GPU its many small kernels become few. Passes
    without gradients, whose shapes vary, run as before. Gates and taps see what they always see.

    Args:
        backend: of torch.compile.

    Raises:
        TrspError: at the first pass, where torch cannot compile them.
    """
    from torch._functorch import config as compiling

    def make(forward: Any) -> Any:
        fast = compiled(forward, backend)
        return lambda *args, **kwargs: (fast if torch.is_grad_enabled() else forward)(*args, **kwargs)

    keeps = compiling.patch(donated_buffer=False)  # some backward passes read what the forward pass kept twice
    with keeps, forwarding({layer: make(layer.forward) for layer in stack.layers}):
        try:
            yield
        finally:
            torch.compiler.reset()  # torch compiles a function for a few shapes only; the next stage has others


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """`function`, compiled by torch.compile, for each shape anew.

    Args:
        backend: of torch.compile.

    Raises:
        TrspError: when the result is called, where torch cannot compile it.
    """
    from torch._dynamo.exc import TorchDynamoException

    fast = torch.compile(function, dynamic=False, backend=backend)

    def through(*args: Any, **kwargs: Any) -> Any:
        try:
            return fast(*args, **kwargs)
        except TorchDynamoException as error:
            raise TrspError(
                f"The layers could not be fused: {str(error)[:300]}",
                "Set --fuse false, or see that there is a C compiler.",
            ) from error

    return through
