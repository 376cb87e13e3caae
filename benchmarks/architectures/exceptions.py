"""What field names alone do not say about some configurations; a path with `!` is set before they are made tiny."""

from __future__ import annotations

from typing import Any

_HYBRID = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPES = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_INDEXER = {"budget": 8, "compress_ratio": 4, "n_heads": 4, "kv_heads": 1, "head_dim": 16}
_EXPERIMENTAL = {**{f"indexer_{name}": value for name, value in _INDEXER.items()}, "ngram_vocab_size_base": 200}
_MROPE = ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl")


def _in_text(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"text_config.{name}": value for name, value in fields.items()}


EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [2]},
    "chameleon": {"vocabulary_map": {"<image>": 126, "IMGIMGA": 100, "IMGIMGB": 101}},
    "cohere_compass": _in_text(_ROPES),
    "cohere_compass_text": _ROPES,
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 126, "<|visual token 000000|>": 100}},
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4": {"text_config.per_layer_config": None},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_assistant": {"!hidden_size_per_layer_input": 0, "text_config.per_layer_config": None},
    "gemma4_unified": {"text_config.per_layer_config": None},
    "gemma4_unified_assistant": {"text_config.per_layer_config": None},
    "glm5_next": {"text_config.num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_k25": {"text_config.head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "layers_block_type": [*2 * ["linear_attention"], "hybrid", "linear_attention", *2 * ["hybrid"]],
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": _SPARSE, "text_config.num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.per_layer_config": None,
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 96,
    },
    "dots3_note": {
        "text_config.per_layer_config": None,
        "vision_config.per_layer_config": None,
        "text_config.num_key_value_heads": 4,
    },
    "dots3_note_text": {"per_layer_config": None, "num_key_value_heads": 4},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1, 2, 3, 3]},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1, 2, 3]},
    "molmo2": {"adapter_config.vision_feature_layer": [2, 1]},
    "qwen4_exp": _in_text(_EXPERIMENTAL),
    "qwen4_exp_text": _EXPERIMENTAL,
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "blenderbot": {"encoder_layers": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "idefics": {"cross_layer_interval": 2},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    **{name: {"text_config.rope_parameters.mrope_section": [2, 3, 3]} for name in _MROPE},
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
}
