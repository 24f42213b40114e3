"""Tiny models of transformers' text families, from the sizes that their configs have in common."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as hf
from transformers.models.auto import modeling_auto

# Whatever a config calls its sizes: each takes those that it has.
_SIZES: dict[str, Any] = {
    "vocab_size": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "dim_model"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "hidden_dim", "ffn_dim", "d_ff", "dim_ff", "d_inner", "n_inner",
         "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 64,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
         "decoder_layers", "num_decoder_layers"), 2,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_experts_per_tok", "num_experts_per_token"), 2
    ),
    **dict.fromkeys(
        ("head_dim", "d_kv", "dim_head", "attention_head_size", "mamba_d_state", "state_size",
         "mamba_n_heads", "mamba_d_head", "attention_window"), 8,
    ),
    **dict.fromkeys(
        ("embedding_size", "sliding_window", "moe_intermediate_size", "q_lora_rank",
         "kv_lora_rank", "shared_expert_intermediate_size"), 16,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"),
        80,
    ),
    "block_size": 4, "num_random_blocks": 1, "n_shared_experts": 1,
}  # fmt: skip


# Rotary positions by sections, as models of pictures have them for the axes.
_SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
# Attention through a latent space has as many keys as queries.
_LATENT = {
    "head_dim": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
# What some need besides, or cannot have (None).
_MORE: dict[str, dict[str, Any]] = {
    "big_bird": {"max_position_embeddings": 128},
    "bigbird_pegasus": {"max_position_embeddings": 128},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "esmc": {"num_key_value_heads": 4},
    "falcon": {"head_dim": None},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1], "d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_offset": 0, "attn_layer_period": 2},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": [8, 8]},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8},
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    # What a row's positions turn by changes past 32 tokens.
    "phi3": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 10.0],
            "partial_rotary_factor": 1.0,
        },
    },
    "prophetnet": {
        "num_hidden_layers": None, "num_encoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 10], "feed_forward_size": 64,
        "attn_layers": ["local", "local"], "local_attn_chunk_length": 8, "is_decoder": False,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 128, "pronunciation_embed_dim": 16, "shape_vocab_size": 128,
        "shape_embed_dim": 16,
    },
    "squeezebert": {"embedding_size": 32},
    "xlnet": {"d_head": None, "max_position_embeddings": None},
    "xlstm": {"v_head_dim": None, "head_dim": None},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    **dict.fromkeys(
        ("axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3",
         "mistral4", "mistral_large4_text", "youtu"), _LATENT,
    ),
}  # fmt: skip
# The families that can be built so small and take nothing but texts.
FAMILIES = [
    "afmoe", "albert", "apertus", "arcee", "aria_text", "axk2", "bailing_hybrid", "bamba",
    "bart", "beam", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt",
    "bitnet", "blenderbot", "blenderbot-small", "bloom", "camembert", "canine",
    "clip_text_model", "codegen", "cohere", "cohere2", "cohere2_moe", "convbert", "cpmant",
    "ctrl", "cwm", "data2vec-text", "deberta", "deberta-v2", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "diffllama", "distilbert", "doge", "electra", "ernie",
    "ernie4_5", "ernie4_5_moe", "esmc", "eurobert", "exaone4", "exaone_moe", "falcon",
    "falcon_mamba", "flaubert", "flex_olmo", "flint", "fnet", "fsmt", "funnel", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
    "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss",
    "gptj", "granite", "granite_docling_text", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "gte", "helium", "hrm_text", "hy_v3", "hy_v4",
    "hyperclovax", "ibert", "imagegpt", "inkling2_text", "inkling_text", "internlm3",
    "iquestcoder", "jais2", "jamba", "jetmoe", "jina_embeddings_v3", "kolibri1", "laguna",
    "layoutlm", "led", "lfm2", "lfm3", "lilt", "llama", "llama4_text", "longformer", "longt5",
    "luke", "m2m_100", "mamba", "mamba2", "marian", "markuplm", "mbart", "megatron-bert",
    "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text",
    "ministral3", "mistral", "mistral4", "mistral_large4_text", "mixtral", "mobilebert",
    "modernbert", "modernbert-decoder", "molmo2_text", "mpnet", "mra", "mt5",
    "muse_glimmer_text", "muse_spark_text", "mvp", "nanochat", "nemotron", "nemotron_h",
    "nllb-moe", "nomic_bert", "nystromformer", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe",
    "openai-gpt", "openai_privacy_filter", "opt", "pegasus", "pegasus_x", "persimmon", "phi",
    "phi3", "phimoe", "plbart", "prophetnet", "qwen2", "qwen2_5_vl_text", "qwen2_moe",
    "qwen2_vl_text", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
    "qwen3_vl_moe_text", "qwen3_vl_text", "qwen4_exp_text", "recurrent_gemma", "reformer",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "rwkv", "seed_oss",
    "smollm3", "solar_open", "splinter", "squeezebert", "stablelm", "starcoder2",
    "switch_transformers", "t5", "tapas", "tipsv2_text_model", "ultrabert", "umt5",
    "vaultgemma", "visual_bert", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet",
    "xlstm", "xmod", "yoso", "youtu",
]  # fmt: skip
# Those that cannot be built from sizes alone, by the reason.
UNBUILT = {
    "needs its parts' sizes one by one": [
        "axk1", "cohere_compass_text", "cosmos3_edge_text", "dots1", "dots3_note_text",
        "embedding_gemma2_text", "falcon_h1", "gemma3n_text", "gemma4_text",
        "gemma4_unified_text", "glm4v_moe_text", "glm4v_text", "glm5_next_text",
        "glm_image_text", "glm_ocr_text", "hunyuan_v1_dense", "hunyuan_v1_moe",
        "hunyuan_vl_text", "layoutlmv3", "lfm2_moe", "longcat_flash", "ministral", "neomme",
        "zamba", "zamba2", "zaya",
    ],
    "makes or reads speech, and is too large at the smallest": [
        "fastspeech2_conformer", "higgs_audio_v2", "seamless_m4t", "seamless_m4t_v2",
        "vits",
    ],
    "is too large at the smallest": [
        "kimi_linear",
    ],
    "needs a package that is not installed": [
        "layoutlmv2",
    ],
}  # fmt: skip
# Their spread: with what most are made with, 0.02, what a layer adds is lost in the rounding.
_SPREAD = 0.2
_MOST_WEIGHTS = 3_000_000


def list_text_families() -> list[str]:
    """Those of transformers' mapping that take token ids and have no other tower."""
    found = []
    for name, classes in modeling_auto.MODEL_MAPPING_NAMES.items():
        try:
            cls = getattr(hf, classes if isinstance(classes, str) else classes[0])
            parts = hf.CONFIG_MAPPING[name].sub_configs
            takes = inspect.signature(cls.forward).parameters
            is_text = cls.main_input_name == "input_ids" and "input_ids" in takes and not parts
        except (AttributeError, ImportError, KeyError):  # needs what is not installed
            continue
        if is_text:
            found.append(name)
    return found


def build(family: str) -> Any:
    """A seeded model, in eval mode.

    Raises:
        Exception: Whatever its classes raise when they cannot be made so small.
    """
    known = hf.CONFIG_MAPPING[family]()
    sizes = {k: v for k, v in _SIZES.items() if getattr(known, k, None) is not None}
    if hasattr(known, "pad_token_id"):
        sizes["pad_token_id"] = _SIZES["pad_token_id"]
    sizes |= _MORE.get(family, {})
    config = hf.CONFIG_MAPPING[family](**{k: v for k, v in sizes.items() if v is not None})
    names = modeling_auto.MODEL_MAPPING_NAMES[family]
    name = names if isinstance(names, str) else names[0]
    cls = getattr(hf, modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(family, name))
    with torch.device("meta"):
        num_weights = sum(p.numel() for p in cls(config).parameters())
    if num_weights > _MOST_WEIGHTS:
        raise ValueError(f"{num_weights:,} weights at the smallest")
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2 and weight.is_floating_point():
                weight.normal_(0, _SPREAD)
    return model
