"""What llama.cpp makes of a pruned model whose layers are of several kinds.

A GGUF file has no word for the kind of each layer in these families: llama.cpp takes the kinds by a fixed pattern, as
the whole model has them. After pruning the kept layers stand elsewhere in that pattern.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trsp_core import formatting
from trsp_core.surgery import families

VERSION = "b9190"  # of llama.cpp, which was read and run
KINDS: dict[Any, str] = {1: "RoPE", 0: "no RoPE"}  # of other values the name is the kind
LISTS = ("layer_types", "no_rope_layers", "layers_block_type", "attention_layers", "mlp_layer_types")


@dataclass(frozen=True)
class Pattern:
    """Every `period`-th layer is of one kind, the others of another.

    Attributes:
        field: of the config, which says what each layer really is.
        usual, other: values in it; `other` is every `period`-th layer.
        depth: the pattern holds in a model of so many layers alone; None: in any.
        elsewhere: what all layers are in a model of another depth.
    """

    period: int
    field: str = "layer_types"
    usual: Any = "sliding_attention"
    other: Any = "full_attention"
    depth: int | None = None
    elsewhere: str = ""

    def kind(self, layer: int, n_layers: int) -> str:
        """What llama.cpp takes `layer`, counted from 0, for."""
        if self.depth not in (None, n_layers):
            return self.elsewhere
        return _kind(self.other if (layer + 1) % self.period == 0 else self.usual)


ROPE = Pattern(4, "no_rope_layers", 1, 0)
CHUNKS = Pattern(4, usual="chunked_attention")
PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "gemma2": (Pattern(2),),
    "gemma3": (Pattern(6),),
    "gemma3_text": (Pattern(6),),
    "cohere2": (Pattern(4),),
    "olmo2": (Pattern(4),),
    "olmo3": (Pattern(4),),
    "gpt_oss": (Pattern(2),),
    "exaone4": (Pattern(4, depth=64, elsewhere="full attention with RoPE"),),
    "llama4": (CHUNKS, ROPE),
    "llama4_text": (CHUNKS, ROPE),
    "smollm3": (ROPE,),
    "qwen2": (Pattern(1),),
    "qwen3": (Pattern(1),),
}
# Depth at which llama.cpp divides the scores of attention by the root of width over heads, not of the width of a head.
SCALED = {"gemma2": 46, "gemma3": 62, "gemma3_text": 62}


def changed(config: dict[str, Any]) -> dict[tuple[str, str], list[int]]:
    """Layers, counted from 0, by what they are and what llama.cpp takes them for, where that differs.

    Args:
        config: of the pruned model, as its config.json holds it.
    """
    return {kinds: list(layers) for kinds, layers in _grouped(_text(config))}


def warning(config: dict[str, Any]) -> str:
    """What a reader has to know before a model with this config.json is converted to GGUF; "" where nothing changes."""
    text = _text(config)
    patterns = PATTERNS.get(str(text.get("model_type")))
    if patterns is None:
        fields = [name for name in LISTS if _is_mixed(text.get(name))] + [n for n in families.INDICES if text.get(n)]
        if not fields:
            return ""
        return (
            f"Its layers are of several kinds ({', '.join(fields)}): whether llama.cpp keeps to them was not checked."
        )
    parts = []
    if groups := changed(config):
        depth = next(len(text[pattern.field]) for pattern in patterns if text.get(pattern.field))
        whole = sorted({layer for layers in groups.values() for layer in layers})
        each = "; ".join(f"{_listed(layers)} from {here} to {there}" for (here, there), layers in groups.items())
        parts.append(
            f"llama.cpp ({VERSION}) takes the kinds of layers by a fixed pattern, whatever was kept. Of the {depth} "
            f"layers here, counted from 0, {len(whole)} would change: {each}."
        )
    if (scales := _scales(text)) and scales[0] != scales[1]:
        parts.append(
            f"llama.cpp ({VERSION}) would divide the scores of attention by the root of "
            f"{formatting.setting(scales[1])}, not of "
            f"{formatting.setting(scales[0])}: it goes by the number of layers."
        )
    return f"In GGUF this model would compute something else. {' '.join(parts)}" if parts else ""


def _grouped(text: dict[str, Any]) -> Iterator[tuple[tuple[str, str], Iterator[int]]]:
    for pattern in PATTERNS.get(str(text.get("model_type")), ()):
        kinds = [_kind(value) for value in text.get(pattern.field) or ()]
        if pattern.depth is not None and len(set(kinds)) < 2:
            continue  # its small models slide nowhere
        pairs = sorted(
            ((here, there), layer)
            for layer, here in enumerate(kinds)
            if here != (there := pattern.kind(layer, len(kinds)))
        )
        for pair, members in itertools.groupby(pairs, key=lambda entry: entry[0]):
            yield pair, (layer for _, layer in members)


def _scales(text: dict[str, Any]) -> tuple[float, float] | None:
    """The squares of what the scores of attention are divided by: after the config, and in llama.cpp."""
    depth = SCALED.get(str(text.get("model_type")))
    names = ("query_pre_attn_scalar", "head_dim", "num_hidden_layers", "hidden_size", "num_attention_heads")
    values: list[Any] = [text.get(name) for name in names]
    if depth is None or not all(isinstance(v, (int, float)) and v > 0 for v in values):
        return None
    here, head, n_layers, width, heads = values
    return here, (width // heads if n_layers == depth else head)


def _text(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _kind(value: Any) -> str:
    return KINDS.get(value, str(value).replace("_", " "))


def _is_mixed(value: Any) -> bool:
    return isinstance(value, list) and len({str(v) for v in value}) > 1


def _listed(layers: list[int]) -> str:
    *first, last = map(str, layers)
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"
