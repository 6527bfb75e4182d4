"""The stack: where the decoder layers are in a causal language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trsp_core.surgery import families


@dataclass(frozen=True)
class Stack:
    """A causal language model and the list of decoder layers inside it.

    Attributes:
        model: the whole model; `model(input_ids=..., use_cache=False).logits` is (B, T, V).
        parent, name: `getattr(parent, name)` is the ModuleList of the L layers.
        extras: how many values a layer returns after the hidden states, in a tuple; None where it returns them alone.
        family: what is particular to this architecture.
        proved: sets of removed layers for which `removal` has proved that the config describes the model.
    """

    model: nn.Module
    parent: nn.Module
    name: str
    extras: int | None
    family: families.Family
    proved: set[frozenset[int]] = field(default_factory=set, compare=False)

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.parent, self.name)

    @property
    def text_config(self) -> Any:
        return text_config(self.model)

    @property
    def context(self) -> int | None:
        """The longest context in tokens; None where the config names no limit."""
        return families.context(self.text_config)

    def writers(self, layer: int) -> list[nn.Module]:
        """The modules of layer `layer` that write into the residual stream: attention's first, the MLP's last."""
        modules = self.layers[layer].named_modules()
        return [module for name, module in modules if name.rpartition(".")[2] in self.family.outputs]

    def outputs(self, layer: int) -> list[nn.Parameter]:
        """The parameters of the `writers` of layer `layer`."""
        return [p for module in self.writers(layer) for p in module.parameters(recurse=True)]


def text_config(model: nn.Module) -> Any:
    """The config of the model's language part: its whole config, unless it has other parts."""
    config: Any = model.config
    return config.get_text_config(decoder=True)
