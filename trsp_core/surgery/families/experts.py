"""Mixtures of experts: all experts of a layer write into the residual stream, and so does the MLP that they share."""

from trsp_core.surgery.families import Family

FAMILIES = (
    Family("Mixtral", ("mixtral",), outputs=("o_proj", "experts")),
    Family(
        "Qwen2-MoE", ("qwen2_moe",), outputs=("o_proj", "experts", "down_proj"), note="mlp_only_layers have no experts"
    ),
    Family(
        "Qwen3-MoE", ("qwen3_moe",), outputs=("o_proj", "experts", "down_proj"), note="mlp_only_layers have no experts"
    ),
)
