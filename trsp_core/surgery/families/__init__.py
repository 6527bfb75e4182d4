"""What is particular to a family of models, as data: each file lists a group of families.

Most models need no entry. Their layers are found by a forward pass (`surgery.discovery`), and the lists of their config
that have one entry a layer by what its class makes of other depths (`surgery.removal`). An entry says what cannot be
seen: which modules write into the residual stream, or why a family cannot be pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from trsp_core import registry

# How most families call the modules of a layer whose output is added to the residual stream.
OUTPUTS = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2", "dense", "dense_4h_to_h", "wo", "w2")

# Names of the config fields that speak of layers; a name means the same in every family.
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # how many at the start are dense
LISTS = (  # lists with one entry a layer, beside those that `removal` finds by itself
    "attention_layers", "layer_types", "layers_block_type", "mlp_layer_types", "moe_intermediate_size", "moe_topk",
    "no_rope_layers", "num_experts", "num_shared_expert", "swiglu_limits", "swiglu_limits_shared",
)  # fmt: skip
INDICES = (  # lists of the numbers of layers of one kind
    "attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "local_layer_ids", "mlp_only_layers",
    "moe_layers",
)  # fmt: skip
ORDINALS = ("ple_layer_ids",)  # the same, but counted from 1
PATTERNS = ("block_types",)  # kinds of layers, repeated from the first layer to the last
DIVIDED = {"scale_depth": 0.5}  # a scale, which models divide by this power of the number of layers
COUNTS = ("num_hidden_layers", "num_layers", "num_blocks")  # the number of layers
NUMBERS = ("layer_idx", "layer_id", "layer_number")  # attributes of a module: its layer's number, counted from 0
CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")  # the longest context in tokens


@dataclass(frozen=True)
class Family:
    """What is particular to a family.

    Attributes:
        name: for people.
        model_types: `config.model_type` of its members.
        outputs: names of the modules in a layer whose output is added to the residual stream, without their path.
        caches: how many entries a layer has in the key-value cache.
        stays: numbers of the layers that cannot be removed.
        refused: why the family cannot be pruned by whole layers here; "" where it can.
        note: what else a reader should know.
    """

    name: str
    model_types: tuple[str, ...]
    outputs: tuple[str, ...] = OUTPUTS
    caches: int = 1
    stays: tuple[int, ...] = ()
    refused: str = ""
    note: str = ""


def context(config: Any) -> int | None:
    """The longest context in tokens, from a config as an object or as decoded JSON; None where it names none."""
    values = config if isinstance(config, dict) else {name: getattr(config, name, None) for name in CONTEXTS}
    length = next((values[name] for name in CONTEXTS if values.get(name) is not None), None)
    return length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else None


@cache
def all_families() -> dict[str, Family]:
    """Every declared family, by name."""
    return {family.name: family for families in registry.declared(__name__, "FAMILIES", tuple) for family in families}


def of(model_type: str) -> Family:
    """The family of `model_type`; for one that is not declared here, a family with nothing particular."""
    for family in all_families().values():
        if model_type in family.model_types:
            return family
    return Family(name=model_type, model_types=(model_type,), note="not declared: found by looking")
