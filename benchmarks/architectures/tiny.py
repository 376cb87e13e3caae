"""Builds a model type of the installed transformers at tiny size: its configuration is made small by field names."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from .exceptions import EXCEPTIONS

VOCABULARY = 128
DEPTH = 4
WIDTH = 64
DECODER_START = 1

FAMILIES: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "causal": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "sequence-to-sequence": (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "encoder": (AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
}
"""Each family's automatic class and its model types."""

# The first pattern that a field's name matches sets its largest value.
LARGEST: tuple[tuple[str, int], ...] = (
    (r"token_id$|_idx$|_index$", VOCABULARY - 1),
    (r"type_vocab|segment_types|prompt_types", 4),
    (r"vocab|num_embeddings", VOCABULARY),
    (r"position_bias|buckets|relative_attention", 32),
    (r"position|n_ctx|max_seq|seq_len|max_length|_topk$|max_source", 256),
    (r"window|^chunk_size|attention_chunk", 8),
    (r"(kv|key_value).*heads|kv_n_heads|num_key_heads|query_groups", 2),
    (r"heads|n_head", 4),
    (r"qk_(nope|rope)_head_dim|rotary_dim", 8),
    (r"head_dim|d_kv|d_head|kv_channels|lora_rank|lowrank|_rank$|state_size|d_state", 16),
    (r"per_tok|top_k|moe_k", 2),
    (r"ffn|intermediate|mlp|dff|d_ff|d_inner|^ff", 96),
    (r"group|first_k_dense|dense_layers|shared_experts|(inner_)?group_num", 1),
    (r"experts", 4),
    (r"layer_(period|offset|interval|step)|sparse_step", 2),
    (r"layers|depth|blocks$|n_layer|num_stages", DEPTH),
    (r"image_size", 32),
    (r"patch_size|merge|kernel|stride|conv", 16),
    (r"hidden|d_model|n_embd|embed|width|dim|size|channels|features", WIDTH),
)


def small_number(name: str, value: int) -> int:
    """The value of a configuration's field, or the largest that is tiny for a field of its name."""
    largest = next((largest for pattern, largest in LARGEST if re.search(pattern, name)), value)
    return min(value, largest)


def _small_list(name: str, values: list[Any], depth: int) -> list[Any]:
    values = [small_number(name, value) if type(value) is int else value for value in values]
    if depth <= DEPTH or len(values) != depth:
        return values
    # Every kind of block that the model has stays, in its order; the last ones give way.
    kept = values[:DEPTH]
    if all(isinstance(value, (str, int)) for value in values):
        missing = [value for value in dict.fromkeys(values) if value not in kept][: DEPTH - 1]
        kept = kept[: DEPTH - len(missing)] + missing
    return kept


def small_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration's dictionary, and of those inside it, made tiny."""
    counts = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "depth", "num_blocks")
    depth = next((fields[name] for name in counts if isinstance(fields.get(name), int)), 0)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if not isinstance(name, str):
            small[name] = value
        elif name in ("transformers_version", "architectures", "label2id", "id2label", "dtype", "torch_dtype"):
            continue
        elif isinstance(value, dict):
            small[name] = small_fields(value) if value else value
        elif name == "head_dim" and value is None:
            small[name] = 16  # WIDTH over the number of heads, which some types do not compute
        elif isinstance(value, bool) or value is None:
            small[name] = value
        elif isinstance(value, int):
            small[name] = small_number(name, value)
        elif isinstance(value, float):
            small[name] = 0.0 if re.search(r"drop", name) else value
        elif isinstance(value, (list, tuple)):
            small[name] = [2, 3, 3] if "mrope_section" in name else _small_list(name, list(value), depth)
        else:
            small[name] = value
    if small.get("kv_lora_rank") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention
    # Special tokens lie above the ones that the checks draw.
    special = [
        name
        for name in small
        if isinstance(name, str) and re.search(r"_token_(id|index)$", name) and type(small[name]) is int
    ]
    for place, name in enumerate(special):
        small[name] = VOCABULARY - 1 - place % 40
    first = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": DECODER_START}
    for name, value in first.items():
        if name in small:
            small[name] = value
    return small


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
    fields[name] = value


def make_config(model_type: str) -> Any:
    """The tiny configuration of a model type."""
    config_class: Any = CONFIG_MAPPING[model_type]
    exceptions = EXCEPTIONS.get(model_type, {})
    before = {path[1:]: value for path, value in exceptions.items() if path.startswith("!")}
    fields = small_fields(copy.deepcopy(config_class(**before).to_dict()))
    for path, value in exceptions.items():
        if not path.startswith("!"):
            _put(fields, path, value)
    accepted = inspect.signature(config_class).parameters
    by_keyword = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    config = config_class(**{name: value for name, value in fields.items() if by_keyword or name in accepted})
    _few_experts(config)
    return config


def _few_experts(config: Any) -> None:
    """Set numbers of experts and of groups by attribute: some types store them by another name than they take."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _few_experts(value)
        elif type(value) is int and re.search("experts|group$", name):
            setattr(config, name, small_number(name, value))


def make_base(family: str, model_type: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Build a model with random weights, for evaluation; the same type has the same weights every time."""
    torch.manual_seed(0)
    automatic, _ = FAMILIES[family]
    config = make_config(model_type)
    options: dict[str, Any] = {"experts_implementation": "eager"}
    try:
        model = automatic.from_config(config, attn_implementation="sdpa", **options)
    except (ValueError, ImportError):
        model = automatic.from_config(config, attn_implementation="eager", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                # Initial weights are so small that a fault would hardly show.
                scale = 0.5 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.1
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    if config.is_encoder_decoder and model.can_generate():
        model.generation_config.decoder_start_token_id = DECODER_START
    return model.to(dtype).eval()
