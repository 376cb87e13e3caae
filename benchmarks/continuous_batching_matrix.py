"""Whether answers of transformers' continuous batching equal those of `generate`, over many settings, beside LoRA's.

`python -m benchmarks.continuous_batching_matrix` runs every setting on tiny models with random weights (a quarter of
an hour on two cores) and prints one line a setting; `--out FILE` keeps them as JSON lines and goes on from those.
"""

from __future__ import annotations

import argparse
import copy
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    Qwen3Config,
)
from transformers.utils import logging

from peft_talan import TalanConfig

VOCABULARY, NEW_TOKENS, DEPTH = 64, 10, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
LAYER_TYPES = ["sliding_attention", "full_attention"] * (DEPTH // 2)
ARCHITECTURES = {
    "qwen3": Qwen3Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "gemma3, window 16": Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=LAYER_TYPES),
}
AXES: dict[str, dict[str, Any]] = {
    "default": {},
    "input": {"talan_position": "input"},
    "mlp, gated": {"talan_mixer": "mlp", "talan_writeback": "gated"},
}
PAGES: dict[str, dict[str, Any]] = {
    "page 8, budget 16": {"page_size": 8, "max_batch_tokens": 16},
    "page 32, budget 256": {"page_size": 32, "max_batch_tokens": 256},
    "page 16, budget 33, no sharing": {"page_size": 16, "max_batch_tokens": 33, "allow_block_sharing": False},
}
LENGTHS = (19, 1, 40, 7, 26, 33)


def make_prompts() -> list[list[int]]:
    """Prompts of all lengths, the last two of which begin as the first does."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [*drawn[:4], drawn[0] + drawn[4], drawn[0] + drawn[5]]


def make_model(architecture: str, attention: str, config: LoraConfig) -> Any:
    """A tiny model with random weights, both halves of whose adapter change the output."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[architecture]), attn_implementation=attention)
    return get_peft_model(base, config).eval()


def expected_answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What `generate` answers."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outputs = [model.generate(input_ids=torch.tensor([prompt]), **options) for prompt in prompts]
    return [output[0, len(prompt) :].tolist() for prompt, output in zip(prompts, outputs, strict=True)]


def answers(model: Any, prompts: list[list[int]], pages: dict[str, Any]) -> list[list[int]]:
    """What continuous batching answers."""
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, **pages),
    )
    return [output.generated_tokens for output in outputs.values()]


def main() -> None:
    """Run every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines; settings that are there are not run again")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    prompts = make_prompts()
    rows: list[dict[str, Any]] = []
    if options.out is not None and options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]
    shared = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    kinds: dict[str, LoraConfig] = {"LoRA": LoraConfig(**shared)}
    for name, axes in AXES.items():
        sizes = {"talan_layers": [1, -1], "talan_slots": 3, "talan_dim": 5, "init_talan_weights": False}
        kinds[name] = TalanConfig(**shared, **sizes, **axes)
    for architecture, attention, (name, config) in product(options.architectures, ("sdpa", "eager"), kinds.items()):
        setting = {"architecture": architecture, "attention": attention, "adapter": name}
        known = [row["pages"] for row in rows if row.items() >= setting.items()]
        missing = {pages: settings for pages, settings in PAGES.items() if pages not in known}
        if not missing:
            continue
        model = make_model(architecture, attention, copy.deepcopy(config))
        expected = expected_answers(model, prompts)
        for pages, settings_of_pages in missing.items():
            found = answers(model, prompts, settings_of_pages)
            right = sum(one == other for one, other in zip(found, expected, strict=False))
            row = {**setting, "pages": pages, "equal": right, "prompts": len(prompts)}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    for kind, of_kind in {
        "LoRA": [row for row in rows if row["adapter"] == "LoRA"],
        "TALAN": [row for row in rows if row["adapter"] != "LoRA"],
    }.items():
        print(f"{kind}: {sum(row['equal'] == row['prompts'] for row in of_kind)} of {len(of_kind)} settings equal")


if __name__ == "__main__":
    main()
