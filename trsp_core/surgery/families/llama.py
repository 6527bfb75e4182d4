"""Llama, and families that are built like it."""

from trsp_core.surgery.families import Family

FAMILIES = (
    Family("Llama", ("llama",), outputs=("o_proj", "down_proj")),
    Family("Mistral", ("mistral",), outputs=("o_proj", "down_proj")),
    Family("Qwen2", ("qwen2",), outputs=("o_proj", "down_proj"), note="layer_types follow the kept layers"),
    Family("Qwen3", ("qwen3",), outputs=("o_proj", "down_proj"), note="layer_types follow the kept layers"),
    Family(
        "OLMo 2", ("olmo2",), outputs=("post_attention_layernorm", "post_feedforward_layernorm"), note="norms come last"
    ),
    Family(
        "Youtu",
        ("youtu",),
        note="with a pad_token_id in its config, transformers 5.23.0 empties that token's row on loading, even where "
        "it was trained; the proof sees it",
    ),
    Family("SmolLM3", ("smollm3",), outputs=("o_proj", "down_proj"), note="no_rope_layers follow the kept layers"),
)
