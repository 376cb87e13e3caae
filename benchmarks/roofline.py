"""Operations and bytes of a side path beside its model's, from formulas; dispatched operations, from tiny models.

What a decoded token or a training step dispatches depends on the number and kind of the blocks, not on their width: it
is counted on narrow models of two and four blocks, since each further block adds the same. The times for a GPU are on
paper.

    python benchmarks/roofline.py
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from calls import decode_calls, key_bytes, train_calls
from conditions import ON_PAPER, SHAPES, make_conditions, random_model
from measure import code_version, machine, operations_of
from peft import LoraConfig, get_peft_model
from runs import write_json
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from peft_talan import TalanConfig
from peft_talan.functional.chunked import CHUNK_SIZE

RESULTS = Path(__file__).parent / "results" / "roofline.json"
SLOTS, WIDTH = 8, 32
CONTEXT = 8192
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LORA_WEIGHTS: dict[str, dict[str, Any]] = {
    "PEFT's defaults (r=8, q and v)": {"r": 8},
    "r=8, all linear layers": {"r": 8, "target_modules": "all-linear"},
    "r=16, all linear layers": {"r": 16, "target_modules": "all-linear"},
}


def side_path_parameters(hidden_size: int) -> int:
    """W_read, W_write and the slot bias: H (3 d + M) + M."""
    return hidden_size * (3 * WIDTH + SLOTS) + SLOTS


def side_path_operations(hidden_size: int, decoding: bool) -> int:
    """Floating-point operations per token: the two projections, and the memory (2 per multiply-add)."""
    projections = 2 * hidden_size * (3 * WIDTH + SLOTS) + 2 * hidden_size
    rank_one_and_read = 6 * SLOTS * WIDTH
    inside_the_chunk = 0 if decoding else 4 * CHUNK_SIZE * (WIDTH + SLOTS)
    return projections + rank_one_and_read + inside_the_chunk


def side_path_bytes(hidden_size: int) -> int:
    """Bytes that a decoded token moves: float32 weights once, the float64 memory and the hidden state in and out."""
    return 4 * side_path_parameters(hidden_size) + 2 * 8 * SLOTS * (WIDTH + 1) + 2 * 2 * hidden_size


def on_meta(config: PreTrainedConfig) -> Any:
    """The model without its numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)


def trainable(config: PreTrainedConfig) -> dict[str, dict[str, float]]:
    """Shares of the backbone's parameters by LoRA weights: the side path's, and those of both."""
    shares = {}
    backbone = on_meta(config).num_parameters()
    for name, low_rank in LORA_WEIGHTS.items():
        with torch.device("meta"):
            configs = (kind(task_type="CAUSAL_LM", **low_rank) for kind in (LoraConfig, TalanConfig))
            models = [get_peft_model(on_meta(config), adapter) for adapter in configs]
        lora, both = (model.get_nb_trainable_parameters()[0] for model in models)
        shares[name] = {"side_path": (both - lora) / backbone, "both_halves": both / backbone}
    return shares


def operations_of_shallow(config: PreTrainedConfig, blocks: int) -> dict[str, dict[str, int]]:
    """What one call of each kind dispatches, counted on a narrow model of so many blocks."""
    narrow = copy.deepcopy(config)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 128, "num_hidden_layers": blocks}
    sizes |= {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, value in sizes.items():
        setattr(narrow, name, value)
    narrow.eos_token_id = narrow.bos_token_id = narrow.pad_token_id = None
    if getattr(narrow, "layer_types", None):
        narrow.layer_types = narrow.layer_types[:blocks]
    base = random_model(narrow, torch.float32)
    models = make_conditions(base, ["base", "lora", "talan", "talan, all blocks", "kept"])
    for name, config_class in (("lora, q and v", LoraConfig), ("talan, q and v", TalanConfig)):
        shared = make_conditions(base, ["base"])["base"]
        models[name] = get_peft_model(shared, config_class(task_type="CAUSAL_LM")).eval()
    calls = decode_calls(models, 16, 1)
    calls |= {f"{name}, no mask": call for name, call in decode_calls(models, 16, 1, masked=False).items()}
    trained = {name: model for name, model in models.items() if name not in ("base", "kept")}
    calls |= {f"{name}, training": call for name, call in train_calls(trained, 64).items()}
    counts = {}
    for name, call in calls.items():
        trains = name.endswith("training")
        for condition, model in models.items():
            model.train(trains and condition in trained)
        for _ in range(2):  # The first call reads the whole mask, the second makes room for what follows.
            call()
        counts[name] = operations_of(call)
    return counts


def operations(config: PreTrainedConfig) -> dict[str, dict[str, int]]:
    """What the whole model's calls dispatch: every block beyond the second adds what the third and the fourth add."""
    two, four = operations_of_shallow(config, 2), operations_of_shallow(config, 4)
    further = config.num_hidden_layers - 2
    return {
        name: {kind: count + (four[name][kind] - count) // 2 * further for kind, count in counts.items()}
        for name, counts in two.items()
    }


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """Everything about one model."""
    model = on_meta(config)
    hidden_size, blocks = config.hidden_size, config.num_hidden_layers
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    head = config.vocab_size * hidden_size
    block = matrices // blocks
    total_operations = 2 * (matrices + head)
    total_bytes = 2 * (matrices + head) + CONTEXT * key_bytes(config, 2)
    return {
        "hidden_size": hidden_size,
        "blocks": blocks,
        "parameters": model.num_parameters(),
        "side_path_parameters": side_path_parameters(hidden_size),
        "block_operations": 2 * block,
        "side_path_operations_prefill": side_path_operations(hidden_size, decoding=False),
        "side_path_operations_decode": side_path_operations(hidden_size, decoding=True),
        "operations_share": side_path_operations(hidden_size, decoding=True) / total_operations,
        "block_bytes": 2 * block,
        "side_path_bytes": side_path_bytes(hidden_size),
        "token_bytes": total_bytes,
        "bytes_share": side_path_bytes(hidden_size) / total_bytes,
        "trainable": trainable(config),
        "dispatched": operations(config),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    models = {"smollm2": SMOLLM2, **SHAPES, **ON_PAPER}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(models), default=list(models))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "code": code_version(), "slots": SLOTS, "width": WIDTH}
    result |= {"context": CONTEXT, "models": {}}
    for name in options.models:
        result["models"][name] = describe(models[name])
        print(name, json.dumps(result["models"][name]), flush=True)
    write_json(options.output, result)


if __name__ == "__main__":
    main()
