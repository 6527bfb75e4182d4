"""Contexts that say which weights learn, and that put weights back."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """On exit, whatever happened, all parameters have their old values and `requires_grad`. Holds one copy of them."""
    copies = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, copy, wanted in copies:
                parameter.copy_(copy)
                parameter.requires_grad_(wanted)


@contextlib.contextmanager
def rewritten(edits: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside, parameters have the values in `edits`; on exit their old ones, to the bit."""
    old = {p: p.detach().clone() for p in edits}
    try:
        _write(edits)
        yield
    finally:
        _write(old)


def _write(values: Mapping[nn.Parameter, Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(value)


@contextlib.contextmanager
def learning(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Inside, only `parameters` of the model require gradients; on exit it is as before, and all gradients are gone."""
    learners = {id(p) for p in parameters}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in learners)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
