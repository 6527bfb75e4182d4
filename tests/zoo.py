"""Every causal language model that transformers knows, with a config shrunk until it is built in a moment."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
V, D, L = 128, 32, 8
MOST_PARAMETERS = 6_000_000  # counted on the meta device, before anything is allocated


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# What a config field is set to where a config has one of this name.
SIZES: dict[str, Any] = {
    **_each(L, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers"),
    **_each(L, "num_decoder_layers num_blocks depth"),
    **_each(V, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    **_each(D, "hidden_size n_embd d_model emb_dim embed_dim embedding_dim embedding_size word_embed_proj_dim"),
    **_each(D, "attention_hidden_size input_embedding_size output_embedding_size lru_width backbone_hidden_size"),
    **_each(4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    **_each(4, "num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads"),
    **_each(4, "linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads"),
    **_each(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    **_each(8, "head_dim swa_head_dim d_head kv_channels dim_head attention_head_size v_head_dim linear_head_dim"),
    **_each(8, "linear_key_head_dim linear_value_head_dim mamba_d_head index_head_dim"),
    **_each(8, "qk_nope_head_dim qk_rope_head_dim"),
    **_each(4, "rotary_dim"),
    **_each(16, "q_lora_rank kv_lora_rank o_lora_rank"),
    **_each(48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner dff dim_ff"),
    **_each(48, "d_inner feed_forward_size dense_intermediate_size intermediate_size_mlp shared_intermediate_size"),
    **_each(16, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    **_each(16, "expert_ffn_hidden_size moe_shared_expert_intermediate_size"),
    **_each(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_each(2, "num_experts_per_tok moe_topk moe_k index_topk_blocks n_group topk_group"),
    **_each(8, "mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank num_centroids"),
    **_each(8, "mamba_n_heads mamba_num_heads"),
    **_each(8, "chunk_size mamba_chunk_size block_size index_block_size"),
    **_each(64, "index_topk"),  # more than the tests read: a choice of tokens turns on the last bit
    **_each(512, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
    **_each(8, "sliding_window sliding_window_size attention_window_size window_size local_attention"),
    **_each(8, "attention_chunk_size local_attention_window_len"),
    **_each(1, "bos_token_id"),
    **_each(2, "eos_token_id"),
    **_each(0, "pad_token_id"),
}  # fmt: skip

DOTS3 = {"head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
         "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}  # fmt: skip

ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": L}
QSA = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
       "indexer_compress_ratio": 4, "hc_lowrank": 8}  # fmt: skip

# Where that is not enough: fields by model type, a nested config by its name.
ODD: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_config": {"hidden_size_global": D},
            "decoder_config": {"hidden_size_global": D}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": DOTS3, "vision_config": None, "audio_config": None},
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_assistant": {"text_config": ASSISTANT},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gemma4_unified": {"vision_config": None, "audio_config": None},
    "gemma4_unified_assistant": {"text_config": ASSISTANT},
    "gpt_neo": {"attention_types": [[["global", "local"], L // 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"] * (L // 4)},
    "kimi_linear": {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (L // 2)},
    "mamba2": {"num_heads": 8},
    "moshi": {"sliding_window": 512},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "moe"] * (L // 4)},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "reformer": {"is_decoder": True, "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (16, 16)},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "autocast_kernel_dtype": "float32"},  # in steps of 64
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # as published; with one, transformers 5.23.0 empties its trained row on loading
    "zamba": {"attention_hidden_size": 2 * D, "attention_head_dim": 16,
              "layers_block_type": ["linear_attention", "hybrid"] * (L // 2)},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * (L // 2)},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def config_of(model_type: str, **fields: Any) -> PreTrainedConfig:
    """The shrunk config of `model_type`, with `fields` set otherwise."""
    cls: Any = CONFIG_MAPPING[model_type]
    return cls(**_shrunk(cls, ODD.get(model_type, {}) | fields))


def _shrunk(cls: Any, odd: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    values = {name: size for name, size in SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # multi-head latent attention: one key and value a head
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, inner in cls.sub_configs.items():
        if inner is AutoConfig:
            inner = CONFIG_MAPPING[cls.sub_configs_defaults[name].model_type]
        if odd.get(name, {}) is None:
            values[name] = None
            continue
        values[name] = {"model_type": inner.model_type} | _shrunk(inner, odd.get(name, {}))
    return values | {name: value for name, value in odd.items() if name not in cls.sub_configs}


def build(model_type: str, seed: int = 0, **fields: Any) -> nn.Module:
    """A random model in float32 from the shrunk config, weights large enough that every layer matters.

    Raises:
        MemoryError: even shrunk it has more than MOST_PARAMETERS.
    """
    config = config_of(model_type, **fields)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise MemoryError(f"{count:,} parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(model_type, **fields), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


def is_decoder(model: nn.Module) -> bool:
    """Whether it is a decoder alone: of no encoder-decoder, and blind to the tokens that follow."""
    config: Any = model.config
    if type(config).is_encoder_decoder:
        return False
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]])
    with torch.no_grad():
        one, other = model(input_ids=ids, use_cache=False).logits[:, :2]
    return torch.allclose(one, other, atol=1e-2)
