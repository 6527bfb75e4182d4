"""LoRA adapters on the linear maps of a model's layers (arXiv:2106.09685), through peft: few numbers learn, and
are merged into the weights at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trsp_core.errors import TrspError
from trsp_core.surgery import Stack

SCALE = 2.0  # lora_alpha / rank, the usual one


@contextlib.contextmanager
def adapted(stack: Stack, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """The layers' linear maps carry adapters of this rank inside; their parameters are what is yielded. On exit the
    adapters are gone, and the weights are what they were unless `merge` was called.

    Raises:
        TrspError: the layers have no linear maps that peft can adapt.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    layers = set(stack.layers.modules())
    maps = [n for n, m in stack.model.named_modules() if m in layers and isinstance(m, (nn.Linear, Conv1D))]
    if not maps:
        raise TrspError(
            f"The layers of {type(stack.model).__name__} have no linear maps to adapt.", "Set --adapter-rank 0."
        )
    turned = any(isinstance(m, Conv1D) for m in layers)
    wanted = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=maps, fan_in_fan_out=turned)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(wanted, stack.model)
        yield [p for n, p in stack.model.named_parameters() if "lora_" in n]
    finally:
        for name, adapter in _adapters(stack).items():
            parent, _, attribute = name.rpartition(".")
            setattr(stack.model.get_submodule(parent), attribute, adapter.get_base_layer())
        if "peft_config" in vars(stack.model):
            del stack.model.peft_config


def merge(stack: Stack) -> None:
    """Add what the adapters have learnt to the weights that they sit on."""
    for adapter in _adapters(stack).values():
        adapter.merge()


def _adapters(stack: Stack) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in stack.model.named_modules() if isinstance(m, BaseTunerLayer)}
