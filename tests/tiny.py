"""Tiny random models of many families, and a tokenizer that is trained in a moment: what the tests prune."""

from __future__ import annotations

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trsp_core.models import catalog
from trsp_core.preparation import forecast

V, D, L = 128, 32, 5
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": V,
    "n_embd": D,
    "n_layer": L,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
MOE = SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
OPT = {k: v for k, v in PLAIN.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": D}
CONFIGS: dict[str, dict] = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 16},
    "qwen2": SIZES,
    "qwen3": SIZES | {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
                      "use_sliding_window": True, "sliding_window": 16},
    "smollm3": SIZES,
    "gemma": SIZES,
    "gemma2": SIZES | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": SIZES | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi": PLAIN,
    "phi3": SIZES,
    "gpt2": GPT2,
    "opt": OPT,
    "gpt_neox": PLAIN,
    "mixtral": MOE | {"num_local_experts": 4},
    "qwen2_moe": MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [2]},
    "qwen3_moe": MOE | {"num_experts": 4, "mlp_only_layers": [2]},
    "gptj": GPT2 | {"rotary_dim": 4},
    "bloom": {"vocab_size": V, "hidden_size": D, "n_layer": L, "n_head": 4},
    "falcon": PLAIN | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "stablelm": SIZES,
    "olmo": SIZES,
    "olmo2": SIZES,
    "granite": SIZES,
    "cohere": SIZES,
    "starcoder2": SIZES,
    "mpt": {"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": 4, "max_seq_len": 512},
    "mamba": {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "state_size": 8, "time_step_rank": 4},
}  # fmt: skip

# Settings of a run on such a model, a second or two in all.
SETTINGS = {
    "block_length": 16,
    "measure_length": 24,
    "measure_blocks": 3,
    "calibration_blocks": 12,
    "probe_every": 2,
    "probe_blocks": 2,
    "stage1_steps": 2,
    "stage2_steps": 3,
    "ratio": 0.4,
    "speed_repeats": 1,
    "sample_tokens": 3,
    "stage2_lr": 1e-3,
    "threads": 1,
}


def build(model_type: str = "llama", seed: int = 0, n_layers: int = L, **fields: object) -> torch.nn.Module:
    """A random model in float32, weights large enough that every layer matters, dropout off."""
    sizes = CONFIGS[model_type] | fields
    sizes[next(name for name in ("n_layer", "n_layers", "num_hidden_layers") if name in sizes)] = n_layers
    if "layer_types" in sizes:
        sizes["layer_types"] = sizes["layer_types"][:n_layers]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of V ids, trained on a sentence."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=V, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    core.train_from_iterator([text(200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def text(sentences: int = 400) -> str:
    """Paragraphs of simple English, the same each time."""
    nouns, verbs = ("river", "city", "garden", "letter", "machine"), ("crosses", "keeps", "finds", "moves", "holds")
    lines = [
        f"The {nouns[i % 5]} {verbs[i // 5 % 5]} the {nouns[i * 7 % 5]} in year {1000 + i * 37 % 900}."
        for i in range(sentences)
    ]
    return "\n\n".join(" ".join(lines[i : i + 8]) for i in range(0, len(lines), 8))


def save(folder, model_type: str = "llama", n_layers: int = L):
    """Model and tokenizer in `folder`, as a checkpoint that loads by its path; returns the folder."""
    build(model_type, n_layers=n_layers).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def planned(config, folder) -> list[str]:
    """Names of the phases that are forecast for `config` on the checkpoint in `folder`."""
    return [phase["name"] for phase in forecast.forecast(config, catalog.facts(str(folder))).phases]


def ids(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length)."""
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))
