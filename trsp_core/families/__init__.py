"""Where a family of models differs from what looking at the model finds. Data, not code; one file a family.

Most models need no file: decoder layers are found by a forward pass (`surgery.find`), and per-layer entries of the
config
by their length. A file here says what cannot be seen: which modules write into the residual stream under another name,
or why a family cannot be pruned.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache

OUTPUTS = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2", "dense", "dense_4h_to_h", "wo", "w2")


# How configs and modules speak of layers by number.
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # so many at the start are dense
INDICES = ("attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "mlp_only_layers", "moe_layers")  # which layers are of a kind
NUMBERS = ("layer_idx", "layer_id", "layer_number")  # a module's own


@dataclass(frozen=True)
class Family:
    """What is particular to a family.

    Attributes:
        name: for people.
        model_types: `config.model_type` of its members.
        outputs: last part of the names of the modules in a layer whose output is added to the residual stream.
        refused: why it cannot be pruned by whole layers here; "" where it can.
        note: anything a reader should know.
    """

    name: str
    model_types: tuple[str, ...]
    outputs: tuple[str, ...] = OUTPUTS
    refused: str = ""
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """How an architecture of transformers fared in the sweep (`python -m tests.sweep_families`).

    Attributes:
        outcome: "supported", "refused", "not built" or "failed".
        reason: of a refusal, or why no tiny model of it could be built, or which law it broke.
    """

    model_type: str
    architecture: str
    outcome: str
    reason: str


@cache
def all_families() -> dict[str, Family]:
    """Every declared family, by name."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        found.extend(importlib.import_module(f"{__name__}.{module.name}").FAMILIES)
    return {f.name: f for f in found}


def of(model_type: str) -> Family:
    """The family of `model_type`; an undeclared one has nothing particular."""
    for family in all_families().values():
        if model_type in family.model_types:
            return family
    return Family(name=model_type, model_types=(model_type,), note="not declared: found by looking")
