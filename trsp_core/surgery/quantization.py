"""Packed weights, in four or eight bits by the library bitsandbytes: how to ask for them, how large they are, and how
to unpack them again. Only the layers' linear maps are packed; embeddings, head and norms stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trsp_core import malloc
from trsp_core.surgery import lora
from trsp_core.surgery.stack import Stack

AT_ONCE = 2**26  # bytes that are copied out of a mapped file before its pages are let go of


def recipe(precision: str, compute: torch.dtype) -> Any:
    """The BitsAndBytesConfig with which transformers loads a model packed.

    Args:
        precision: "nf4" (four bits, their scales quantized once more) or "int8".
        compute: number format of the products with nf4 weights; int8 has its own.
    """
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def settle(model: nn.Module) -> None:
    """Make a model that was just loaded fit for training, packed or not.

    - What lies in a mapped file on a CPU is copied into memory, since somebody may write to the file.
    - Packed weights keep their layout. On CPUs with AVX512-BF16, bitsandbytes 0.50 changes it at the first pass without
      gradients, and gradients are wrong from then on, without an error.
    - The warning of bitsandbytes at each product, that inputs are rounded to float16, is silenced.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    copied = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()  # out of the mapped file, which somebody may write to
            copied += tensor.nbytes
            if copied > AT_ONCE:
                malloc.let_go_of_files(".safetensors")
                copied = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_packed(model: nn.Module) -> bool:
    """Whether the layers' weights are packed."""
    return bool(getattr(model, "is_quantized", False))


def name_of(model: nn.Module) -> str:
    """The precision of a packed model, as `recipe` calls it; "" of any other."""
    if not is_packed(model):
        return ""
    return "int8" if getattr(model, "is_loaded_in_8bit", False) else "nf4"


def size_of(parameter: Tensor) -> tuple[int, int]:
    """How many numbers a parameter stands for, packed or not, and how many bytes it takes with its scales."""
    count, size = parameter.numel(), parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    if state is not None:  # the table of the sixteen values is shared by all
        count = state.shape.numel()
        scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
        size += sum(t.numel() * t.element_size() for t in scales)
    elif hasattr(parameter, "SCB"):
        size += 4 * len(parameter)  # a scale for each row
    return count, size


def unpacked(module: Any) -> Tensor:
    """The weight (out, in) of a linear map as plain numbers; one that is not packed is returned as it is."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB  # where a first pass leaves them
        return weight.data.float() * (scales.float() / 127)[:, None]
    return weight


@contextlib.contextmanager
def opened(stack: Stack, modules: Collection[nn.Module]) -> Iterator[None]:
    """Inside, those of `modules` that are packed linear maps are ordinary ones, with the weights that they stand for in
    the number format of what is not packed. On exit the packed ones are back."""
    packed_maps = {n: m for n, m in stack.model.named_modules() if m in modules and _is_packed_map(m)}
    outer: Any = stack.model
    dtype = outer.get_input_embeddings().weight.dtype
    for name, module in packed_maps.items():
        weight, bias = unpacked(module).detach().to(dtype), vars(module)["_parameters"]["bias"]
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.register_parameter("bias", bias)
        lora.put(stack, name, plain)
    try:
        yield
    finally:
        for name, module in packed_maps.items():
            lora.put(stack, name, module)


@contextlib.contextmanager
def named_in_config(stack: Stack) -> Iterator[None]:
    """Inside, the config of a packed model in whose layers some linear maps are `opened` names all that are, as a
    checkpoint of it has to."""
    outer: Any = stack.model
    if not is_packed(outer) or not any(type(m) is nn.Linear for m in stack.layers.modules()):
        yield
        return
    recipe_in_use = outer.config.quantization_config
    before = recipe_in_use.llm_int8_skip_modules
    recipe_in_use.llm_int8_skip_modules = [n for n, m in outer.named_modules() if type(m) is nn.Linear]
    try:
        yield
    finally:
        recipe_in_use.llm_int8_skip_modules = before


def _is_packed_map(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return hasattr(weight, "quant_state") or hasattr(weight, "SCB")


def spelled_out(stack: Stack, dtype: torch.dtype) -> Any:
    """A copy of the model as an ordinary one in `dtype`: weights unpacked, adapters merged. The model itself stays."""
    state: dict[str, Tensor] = {}
    plain_weights: dict[int, Tensor] = {}  # by parameter, so that tied ones stay tied
    carried = lora.of(stack)
    inside = tuple(f"{name}." for name in carried)
    with torch.no_grad():
        for name, module in stack.model.named_modules(remove_duplicate=False):
            if name.startswith(inside):
                continue
            base = carried[name].get_base_layer() if name in carried else module
            for leaf, parameter in base._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in plain_weights:
                    value = unpacked(base) if leaf == "weight" else parameter
                    if name in carried and leaf == "weight":
                        value = value.float() + carried[name].get_delta_weight("default").float()
                    plain_weights[id(parameter)] = value.detach().to(dtype).clone()
                state[f"{name}.{leaf}"] = plain_weights[id(parameter)]
            for leaf, buffer in base._buffers.items():
                if buffer is not None:
                    state[f"{name}.{leaf}"] = buffer.detach().clone()
    outer: Any = stack.model
    config = copy.deepcopy(outer.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    with torch.device("meta"):
        plain = type(outer)(config)
    plain.generation_config = outer.generation_config
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    for name, buffer in plain.named_buffers():
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            plain.get_submodule(parent)._buffers[leaf] = state[name]
    lacking = [name for name, p in plain.named_parameters() if p.is_meta]
    assert not lacking, f"not spelled out: {lacking[:3]}"
    return plain.eval()
