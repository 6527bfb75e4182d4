"""The models that the workbench keeps in memory: loaded once, equal tensors held once, the least used dropped first."""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trsp_core import formatting, machine
from trsp_core.errors import TrspError
from trsp_core.evaluation import perplexity
from trsp_core.models import catalog, loading
from trsp_core.perf.replicas import view
from trsp_core.schema import messages
from trsp_core.schema.messages import Variant
from trsp_core.surgery import discovery, removal
from trsp_core.surgery.stack import Stack

MOST_MODELS = 4
BYTES_EACH = 4  # float32
WORKING_BYTES = 100_000_000  # left free for activations and caches
WORKING_ROWS = 4 * 512  # of logits, beside that: what a what-if holds at its peak


@dataclass(frozen=True)
class Model:
    """One model in memory.

    Attributes:
        stack: the model and its L layers. `tokenizer` is the one beside it.
        bytes: of its parameters; `shared` of them are tensors of another model in the cache.
        seconds: that loading took.
        studies: what has been measured on it, and goes with it; see `what_if`.
    """

    name: str
    stack: Stack
    tokenizer: Any
    bytes: int
    shared: int
    seconds: float
    studies: OrderedDict[tuple, Any] = field(default_factory=OrderedDict)

    def ready(self) -> messages.ModelReady:
        parameters = perplexity.parameter_bytes(self.stack.model)[0]
        return messages.ModelReady(
            self.name, len(self.stack.layers), parameters, self.bytes, self.shared, round(self.seconds, 2)
        )


class ModelCache:
    """Models by name, the last used at the end.

    Args:
        most: models at once.
        device: where they are held: "cpu", "cuda", or "auto" for a GPU where there is one.
    """

    def __init__(self, most: int = MOST_MODELS, device: str = "auto"):
        self.most, self.device = most, loading.pick_device(device)
        self.models: OrderedDict[str, Model] = OrderedDict()

    def take(self, variant: Variant, beside: Collection[str] = ()) -> Model:
        """The model of `variant`, loaded if it is not there; less `variant.removed`, as a view that copies no tensor.

        Args:
            beside: names of models that are in use and may not be dropped to make room.

        Raises:
            TrspError: no such model, no such layer, or no room; with the numbers.
        """
        model = self._whole(variant, {*beside, variant.model, variant.base})
        return without(model, variant.removed) if variant.removed else model

    def clear(self) -> None:
        self.models.clear()
        gc.collect()

    def _whole(self, variant: Variant, beside: set[str]) -> Model:
        name = variant.model
        if name in self.models:
            self.models.move_to_end(name)
            return self.models[name]
        began = time.perf_counter()
        facts = catalog.facts(name)
        numbers = facts.parameters + WORKING_ROWS * facts.vocabulary
        self._make_room(numbers * BYTES_EACH + WORKING_BYTES, name, beside)
        loaded, tokenizer = loading.load(name, device=self.device)
        loaded.requires_grad_(False)
        stack = discovery.find(loaded)
        base = self.models.get(variant.base)
        shared = share(stack, base.stack, variant.kept) if base else 0
        size = perplexity.parameter_bytes(loaded)[1]
        self.models[name] = Model(name, stack, tokenizer, size, shared, time.perf_counter() - began)
        return self.models[name]

    def _make_room(self, need: int, name: str, beside: set[str]) -> None:
        """Drop models, least used first, until `need` bytes are free."""
        while self.models and (len(self.models) >= self.most or self._free() < need):
            spare = next((n for n in self.models if n not in beside), None)
            if spare is None:
                break
            del self.models[spare]
            gc.collect()
        free = self._free()
        if free < need:
            where = " on the GPU" if self.device == "cuda" else ""
            raise TrspError(
                f"The workbench needs {formatting.size(need)} for {name}, and {formatting.size(free)} are free{where}.",
                "Wait for runs to end, or take fewer or smaller models.",
            )

    def _free(self) -> int:
        """Bytes that another model can take."""
        if self.device != "cuda":
            return machine.available_memory()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def without(model: Model, removed: Collection[int]) -> Model:
    """A view of `model` that lacks `removed`: a model of its own for config and cache, with the same tensors.

    Raises:
        TrspError: a layer that does not exist, or all of them.
    """
    n_layers = len(model.stack.layers)
    if not set(removed) < set(range(n_layers)):
        raise TrspError(
            f"Layers {sorted(removed)} cannot be removed: {model.name} has layers 0 to {n_layers - 1}.",
            "Leave at least one layer, and name layers that exist.",
        )
    stack = view(model.stack)
    removal.remove(stack, removed)
    size = perplexity.parameter_bytes(stack.model)[1]
    return Model(model.name, stack, model.tokenizer, size, size, 0.0)


def share(stack: Stack, base: Stack, base_layers: list[int]) -> int:
    """Let parameters of `stack` that equal those of `base` be the same tensors; returns their bytes.

    Args:
        base_layers: the layer of `base` that each layer of `stack` was.
    """
    if len(base_layers) != len(stack.layers) or max(base_layers, default=0) >= len(base.layers):
        return 0
    tensors = {name: p for name, p in _by_dense_name(base, list(range(len(base.layers))))}
    shared: dict[int, int] = {}
    for module in stack.model.modules():
        module._parameters = dict(module._parameters)
    for dense_name, (module, leaf) in _owners(stack, base_layers).items():
        mine, other = module._parameters[leaf], tensors.get(dense_name)
        if mine is None or other is None or mine is other or mine.shape != other.shape or mine.dtype != other.dtype:
            continue
        if torch.equal(mine, other):
            module._parameters[leaf] = other
            shared[id(other)] = other.numel() * other.element_size()
    return sum(shared.values())


def _owners(stack: Stack, numbers: list[int]) -> dict[str, tuple[nn.Module, str]]:
    """Each parameter's module and its name there, by dense name: its path, in which layer i is `numbers[i]`."""
    prefix = next(name for name, m in stack.model.named_modules() if m is stack.layers)
    owners: dict[str, tuple[nn.Module, str]] = {}
    for path, module in stack.model.named_modules(remove_duplicate=False):
        dense_name = path
        if path.startswith(prefix + "."):
            number, _, rest = path[len(prefix) + 1 :].partition(".")
            dense_name = f"{prefix}.{numbers[int(number)]}.{rest}"
        for leaf in module._parameters:
            owners[f"{dense_name}|{leaf}"] = (module, leaf)
    return owners


def _by_dense_name(stack: Stack, numbers: list[int]) -> Iterator[tuple[str, nn.Parameter]]:
    for dense_name, (module, leaf) in _owners(stack, numbers).items():
        parameter = module._parameters[leaf]
        if parameter is not None:
            yield dense_name, parameter
