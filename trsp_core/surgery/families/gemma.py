"""Gemma. From Gemma 2 on a norm follows attention and MLP, so these norms are what writes into the residual stream."""

from trsp_core.surgery.families import Family

_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES = (
    Family("Gemma", ("gemma",), outputs=("o_proj", "down_proj")),
    Family("Gemma 2", ("gemma2",), outputs=_POST_NORMS, note="sliding and full attention alternate by layer_types"),
    Family("Gemma 3", ("gemma3_text",), outputs=_POST_NORMS, note="five sliding layers to one full, by layer_types"),
    Family(
        "Gemma 3n",
        ("gemma3n", "gemma3n_text"),
        refused="its last layers reuse the key-value cache of earlier ones, and each layer has inputs of its own",
    ),
    Family(
        "Gemma 4",
        ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
        outputs=_POST_NORMS,
        note="where no layer has inputs of its own (hidden_size_per_layer_input 0)",
    ),
)
