"""Makes more sets of module objects over the tensors of one model, so that passes that differ (skip other layers,
gather other gradients) can run side by side."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trsp_core.surgery.stack import Stack


def lane(stack: Stack) -> Stack:
    """A `view` of the model with gradients of its own: each parameter that learns in `stack` is another parameter here,
    over the same memory."""
    twin_stack = view(stack)
    twins: dict[Tensor, nn.Parameter] = {}
    for module in twin_stack.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                twin = twins.setdefault(parameter, nn.Parameter(parameter.detach()))
                module._parameters[name] = twin
    return twin_stack


def gather(stack: Stack, lanes: list[Stack]) -> None:
    """Add the gradients of `lanes`, in order, to those of `stack`, and drop them in `lanes`."""
    with torch.no_grad():
        for parameter, *parts in zip(*(one.model.parameters() for one in (stack, *lanes)), strict=True):
            for part in parts:
                if part is not parameter and part.grad is not None:
                    parameter.grad = part.grad if parameter.grad is None else parameter.grad.add_(part.grad)
                    part.grad = None


def view(stack: Stack) -> Stack:
    """The same model as other module objects, in which every parameter and buffer is the same tensor. Its list of
    layers, layer numbers, hooks and config can change without any effect on `stack`."""
    twins: dict[int, nn.Module] = {}
    outer: Any = stack.model.config
    twin = copy.deepcopy(outer)
    configs = {id(outer): twin}
    configs.setdefault(id(stack.text_config), twin.get_text_config(decoder=True))
    model = _twin(stack.model, twins, configs)
    return Stack(model, twins[id(stack.parent)], stack.name, stack.extras, stack.family)


def _twin(module: nn.Module, twins: dict[int, nn.Module], configs: dict[int, Any]) -> nn.Module:
    """A copy of `module` and its submodules over the same tensors.

    Args:
        twins: the copies made so far, by the id of the original; it grows.
        configs: the config to put in the place of another, by the id of that.
    """
    if id(module) in twins:
        return twins[id(module)]
    twin = twins[id(module)] = copy.copy(module)
    for name in ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
        twin.__dict__[name] = copy.copy(module.__dict__[name])
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child, twins, configs) for name, child in module._modules.items()
    }
    for name, value in module.__dict__.items():
        if id(value) in configs:
            twin.__dict__[name] = configs[id(value)]
    return twin
