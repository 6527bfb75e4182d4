"""One model as several sets of module objects over the same tensors, so that passes that skip different layers can go
side by side."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from trsp_core.surgery import Stack


def view(stack: Stack) -> Stack:
    """The same model as other module objects: layer list, layer numbers and config can change without a trace on
    `stack`, while every parameter and buffer is the same tensor."""
    twins: dict[int, nn.Module] = {}
    outer: Any = stack.model.config
    twin = copy.deepcopy(outer)
    configs = {id(outer): twin}
    configs.setdefault(id(stack.text_config), twin.get_text_config(decoder=True))
    model = _twin(stack.model, twins, configs)
    return Stack(model, twins[id(stack.parent)], stack.name, stack.extras, stack.family)


def _twin(module: nn.Module, twins: dict[int, nn.Module], configs: dict[int, Any]) -> nn.Module:
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
