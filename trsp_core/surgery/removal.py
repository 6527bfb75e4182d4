"""Takes layers out of a model, or makes them narrower, while a context is open, and proves that the config says so."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from trsp_core.errors import TrspError
from trsp_core.surgery import families
from trsp_core.surgery.stack import Stack

MEMORIES = (CacheLayerMixin, LinearAttentionCacheLayerMixin)
DEPTHS = (12, 24)  # of two configs that show which lists grow with the layers; patterns of 2, 3, 4 and 6 layers fit in


@contextlib.contextmanager
def removed(stack: Stack, layers: Collection[int]) -> Iterator[nn.Module]:
    """Inside, the model is one without `layers`: they are gone from its list, and config and layer numbers are as if it
    never had them, so that it caches, saves and reloads like any other. On exit all is put back.

    Raises:
        TrspError: the config cannot describe a model without these layers.
    """
    restore = remove(stack, layers)
    try:
        yield stack.model
    finally:
        restore()


def remove(stack: Stack, layers: Collection[int]) -> Callable[[], None]:
    """As `removed`, but until the function that it returns is called, which puts all back.

    Raises:
        TrspError: the config cannot describe a model without these layers; then the model is as it was.
    """
    old, config = stack.layers, stack.text_config
    gone = frozenset(layers)
    keep = [i for i in range(len(old)) if i not in gone]
    memories = _memories(config)
    before = dict(vars(config))
    fields = (*families.NUMBERS, "num_hidden_layers")
    numbers = [(m, n, vars(m)[n]) for layer in old for m in layer.modules() for n in fields if n in vars(m)]

    def restore() -> None:
        setattr(stack.parent, stack.name, old)
        vars(config).clear()
        vars(config).update(before)
        for module, name, number in numbers:
            setattr(module, name, number)

    setattr(stack.parent, stack.name, nn.ModuleList([old[i] for i in keep]))
    try:
        _say_of_layers(config, len(old), keep, stack.family.caches)
        for new, i in enumerate(keep):
            for module in old[i].modules():
                _renumber(module, i, new, stack.family.caches)
                if vars(module).get("num_hidden_layers") == len(old):
                    module.num_hidden_layers = len(keep)  # type: ignore[assignment]
        if gone not in stack.proved:
            _prove(stack, gone, memories)
            stack.proved.add(gone)
    except BaseException:
        restore()
        raise
    return restore


def _renumber(module: nn.Module, old: int, new: int, caches: int) -> None:
    """Let `module`, a part of layer `old`, carry the number `new`. It may name its layer or, where a layer has several
    `caches`, one of them."""
    new_numbers = {old: new} | {caches * old + k: caches * new + k for k in range(caches)}
    for name in families.NUMBERS:
        if vars(module).get(name) in new_numbers:
            setattr(module, name, new_numbers[vars(module)[name]])


def _say_of_layers(config: Any, n_layers: int, keep: Sequence[int], caches: int) -> None:
    """Let `config` describe only the layers in `keep`, of `n_layers`: its depth, its lists with one entry a layer, the
    fields that `families` names, and what a heterogeneous config overrides for single layers."""
    entries: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in families.LEADING and isinstance(value, int):
            entries[name] = sum(i < value for i in keep)
        elif name in families.INDICES and isinstance(value, (list, tuple)):
            entries[name] = type(value)(new for new, i in enumerate(keep) if i in value)
        elif name in families.ORDINALS and isinstance(value, (list, tuple)):
            entries[name] = type(value)(new + 1 for new, i in enumerate(keep) if i + 1 in value)
        elif name in families.PATTERNS and value:
            entries[name] = [value[i % len(value)] for i in keep]
        elif name in families.COUNTS and value == n_layers:
            entries[name] = len(keep)
        elif name in families.DIVIDED:
            entries[name] = value * (len(keep) / n_layers) ** families.DIVIDED[name]
        elif isinstance(value, (list, tuple)) and len(value) == n_layers and _is_per_layer(type(config), name):
            entries[name] = type(value)(value[i] for i in keep)
    different = vars(config).pop("_heterogeneity_spec", None)
    config.num_hidden_layers = len(keep) * caches  # under whatever name this config keeps it
    for name, value in entries.items():
        setattr(config, name, value)
    if different:
        by_layer = different.per_layer_overrides
        config.per_layer_config = {new: by_layer[i] for new, i in enumerate(keep) if i in by_layer}


def _is_per_layer(config_class: type, name: str) -> bool:
    """Whether the config's list `name` has one entry a layer. Its length does not tell: a list of token ids or limits
    may happen to be as long."""
    return name in families.LISTS or name in _growing(config_class)


@functools.cache
def _growing(config_class: type) -> frozenset[str]:
    """Names of the lists that are as long as the model is deep, in default configs of both `DEPTHS`; none where the
    class does not take its other defaults at another depth."""
    lists = []
    for depth in DEPTHS:
        try:
            values = vars(config_class(num_hidden_layers=depth))
        except StrictDataclassClassValidationError:  # by a rule of the class, this depth and its defaults contradict
            return frozenset()
        lists.append({n for n, v in values.items() if isinstance(v, (list, tuple)) and len(v) == depth})
    return frozenset.intersection(*map(frozenset, lists))


def _prove(stack: Stack, gone: frozenset[int], memories: set[type]) -> None:
    """Raise TrspError unless the config describes the model as it is without the layers `gone`: a model built from it,
    without memory for weights, has to have the same shapes and, in its layers, the same numbers and texts.

    Args:
        memories: the kinds of cache that the layers had before; each kind has to be left, since a hybrid model asks one
            layer of each kind how far it has read.
    """
    model, name = stack.model, type(stack.model).__name__
    path = next(n for n, m in model.named_modules() if m is stack.parent)
    without = f"without layer{'s' if len(gone) > 1 else ''} {', '.join(map(str, sorted(gone)))}"
    remedy = "Protect these layers from removal, or choose another model."
    if gone & set(stack.family.stays):
        raise TrspError(f"{name} cannot be used {without}: {stack.family.note}.", remedy)
    if memories - _memories(stack.text_config):
        raise TrspError(f"{name} {without} has attention layers alone, or none.", remedy)
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config))
    except Exception as error:
        raise TrspError(f"{name} cannot be built {without}: {error}.", remedy) from error
    here = _described(model, stack.layers)
    there = _described(twin, getattr(twin.get_submodule(path), stack.name))
    for key in [*here, *there]:
        value, claim = (side.get(key, "missing") for side in (here, there))
        if not (value == claim or (isinstance(value, float) and math.isclose(value, claim))):
            raise TrspError(f"The config of {name} cannot say what it is {without}: {key}, {value} or {claim}.", remedy)


def _memories(config: Any) -> set[type]:
    """The kinds of cache that the layers of such a config have: of keys and values, of a state, or both."""
    layers = DynamicCache(config=config).layers
    return {kind for kind in MEMORIES if any(isinstance(layer, kind) for layer in layers)}


def _described(model: nn.Module, layers: nn.ModuleList) -> dict[str, Any]:
    """What `_prove` compares, by name: shapes of all parameters, and numbers and texts that the layers' modules hold.
    A packed weight counts with its unpacked shape; adapters, and the attributes of linear maps, are left out."""
    shapes: dict[str, Any] = {
        name.replace(".base_layer", ""): tuple(getattr(p, "quant_state", p).shape)
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    return shapes | {
        f"layers.{path}.{name}": value
        for path, module in layers.named_modules()
        if not isinstance(module, nn.Linear) and not hasattr(module, "get_base_layer")
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str)) and name != "training" and not name.startswith("_")
    }


@contextlib.contextmanager
def narrowed(stack: Stack, layers: Sequence[nn.Module], entries: Mapping[str, int]) -> Iterator[nn.Module]:
    """Inside, the model has `layers` in place of its own, and its config these `entries`. On exit all is put back."""
    old, values = stack.layers, vars(stack.text_config)
    before = {name: values[name] for name in entries if name in values}
    setattr(stack.parent, stack.name, nn.ModuleList(layers))
    try:
        for name, value in entries.items():
            setattr(stack.text_config, name, value)
        yield stack.model
    finally:
        setattr(stack.parent, stack.name, old)
        for name in entries:
            if name in before:
                setattr(stack.text_config, name, before[name])
            else:
                delattr(stack.text_config, name)
