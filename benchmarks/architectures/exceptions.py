"""What the field names alone do not say about some configurations; a path with `!` is set before they are made tiny."""

from __future__ import annotations

from typing import Any

_HYBRID = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "chameleon": {"vocabulary_map": {"<image>": 126, "IMGIMGA": 100, "IMGIMGB": 101}},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "diffusion_gemma": {"text_config.per_layer_config": None},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"vision_config.per_layer_config": None, "text_config.num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
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
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": [
            "linear_attention",
            "linear_attention",
            "hybrid",
            "linear_attention",
            "hybrid",
            "hybrid",
        ],
    },
}
