"""Puts LoRA adapters (arXiv:2106.09685, by the library peft) on the linear maps of a model's layers: a few numbers
learn instead of the weights, and can be merged into them at the end."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trsp_core.errors import TrspError
from trsp_core.surgery.stack import Stack

SCALE = 2.0  # lora_alpha / rank, the usual one


@contextlib.contextmanager
def adapted(stack: Stack, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Inside, the linear maps of all layers carry adapters of this rank; yields the adapters' parameters. On exit the
    adapters are gone, and the weights are what they were, unless `merge` was called.

    Args:
        seed: of the adapters' first values.

    Raises:
        TrspError: the layers have no linear maps that peft can adapt.
    """
    from peft import inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    layers = set(stack.layers.modules())
    maps = [n for n, m in stack.model.named_modules() if m in layers and isinstance(m, (nn.Linear, Conv1D))]
    if not maps:
        raise TrspError(
            f"The layers of {type(stack.model).__name__} have no linear maps to adapt.", "Set --adapter-rank 0."
        )
    turned = any(isinstance(m, Conv1D) for m in layers)
    peft_config = _config(rank, maps, turned)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(peft_config, stack.model)
        for adapter in of(stack).values():
            if type(adapter.get_base_layer()) is nn.Linear:
                adapter.__class__ = _in_one_step(type(adapter))
        yield learnable(stack)
    finally:
        _put_back(stack, of(stack))


@functools.cache
def _in_one_step(kind: type) -> type:
    """A subclass of peft's adapter class `kind` whose forward is `_through`. A forward that is set on an adapter itself
    would go along with a copy of it, and compute with the original's parameters."""
    return type(kind.__name__, (kind,), {"forward": _through})


def _through(adapter: Any, x: Tensor) -> Tensor:
    """What peft's forward returns for `x` (..., D), computed as one operation: see `_Adapted`."""
    base, down, up = adapter.get_base_layer(), adapter.lora_A["default"], adapter.lora_B["default"]
    return _Adapted.apply(x, base.weight, base.bias, down.weight, up.weight)  # type: ignore[return-value]


class _Adapted(torch.autograd.Function):
    """x W^T + b + SCALE x A^T B^T for x (..., D): W (out, D) and b are frozen, A (rank, D) and B (out, rank) learn.

    Products with a matrix this narrow take longer than their operations account for. Forward and backward take six of
    them here, added up in place; peft's take eight, and hold three more tensors of x's size."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, down, up):  # type: ignore[override]
        rows = x.flatten(0, -2)
        low = F.linear(rows, down)
        ctx.save_for_backward(rows, low, weight, down, up)
        out = F.linear(rows, weight, bias).addmm_(low, up.T, alpha=SCALE)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        rows, low, weight, down, up = ctx.saved_tensors
        slope = upstream.flatten(0, -2)
        below = F.linear(slope, (SCALE * up).T.contiguous())
        into = (slope @ weight).addmm_(below, down).view(*upstream.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return into, None, None, below.T @ rows, (low.T @ slope).T * SCALE


def learnable(stack: Stack) -> list[nn.Parameter]:
    """The parameters of the adapters on the model; [] where it has none."""
    return [p for n, p in stack.model.named_parameters() if "lora_" in n]


def merge(stack: Stack) -> None:
    """Add to each weight what the adapter on it has learnt; the adapters stay until `adapted` ends."""
    for adapter in of(stack).values():
        adapter.merge()


@contextlib.contextmanager
def set_aside(stack: Stack) -> Iterator[None]:
    """Inside, the model is without its adapters; on exit they are back, with what they have learnt."""
    carried = of(stack)
    _put_back(stack, carried)
    try:
        yield
    finally:
        for name, adapter in carried.items():
            put(stack, name, adapter)


def save(stack: Stack, folder: Path, base: str) -> None:
    """Write the adapters into `folder` as peft does, for `PeftModel.from_pretrained(model, folder)`.

    Args:
        base: name of the model that they belong to, for their config.
    """
    from safetensors.torch import save_file

    carried = of(stack)
    adapter = next(iter(carried.values()))
    peft_config = _config(adapter.r["default"], list(carried), bool(getattr(adapter, "fan_in_fan_out", False)))
    peft_config.task_type, peft_config.base_model_name_or_path, peft_config.inference_mode = "CAUSAL_LM", base, True
    folder.mkdir(parents=True, exist_ok=True)
    peft_config.save_pretrained(str(folder))
    adapters = [(n, p) for n, p in stack.model.named_parameters() if "lora_" in n]
    tensors = {f"base_model.model.{n.replace('.default', '')}": p.detach().cpu().contiguous() for n, p in adapters}
    save_file(tensors, folder / "adapter_model.safetensors")


def _config(rank: int, maps: list[str], turned: bool) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=maps, fan_in_fan_out=turned)


def _put_back(stack: Stack, carried: dict[str, Any]) -> None:
    """Put the linear maps themselves back in place of the adapters `carried`, and forget peft's config."""
    for name, adapter in carried.items():
        put(stack, name, adapter.get_base_layer())
    if "peft_config" in vars(stack.model):
        del stack.model.peft_config


def put(stack: Stack, name: str, module: nn.Module) -> None:
    """Put `module` in place of the one called `name` in the model."""
    parent, _, attribute = name.rpartition(".")
    setattr(stack.model.get_submodule(parent), attribute, module)


def of(stack: Stack) -> dict[str, Any]:
    """The adapters on the model, by the name of the linear map that each sits on; {} where there are none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in stack.model.named_modules() if isinstance(m, BaseTunerLayer)}
