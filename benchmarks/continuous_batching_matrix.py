"""Whether answers of transformers' continuous batching equal those of `generate`, over many settings, beside LoRA's.

`python -m benchmarks.continuous_batching_matrix` runs every setting on tiny models with random weights (a quarter of
an hour on two cores) and prints one line per setting; `--out FILE` keeps them as JSON lines and continues from those.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from tests.small_models import CONFIGS, VOCABULARY, make_config, make_lora_config

from .runs import Row, append_line, read_lines

NEW_TOKENS, WINDOW = 10, 16
ARCHITECTURES = ("qwen3", "llama", f"gemma3, window {WINDOW}")
ADAPTERS: dict[str, LoraConfig] = {
    "LoRA": make_lora_config(init_lora_weights=False),
    "default": make_config(),
    "input": make_config(talan_position="input"),
    "mlp, gated": make_config(talan_mixer="mlp", talan_writeback="gated"),
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


def make_model(architecture: str, attention: str, adapter: str) -> Any:
    """A tiny model with random weights, all of whose adapter changes the output."""
    name, *window = architecture.split(", window ")
    config = copy.deepcopy(CONFIGS[name])
    if window:
        config.sliding_window = int(window[0])
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return get_peft_model(base, copy.deepcopy(ADAPTERS[adapter])).eval()


def expected_answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What `generate` answers."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outputs = [model.generate(input_ids=torch.tensor([prompt]), **options) for prompt in prompts]
    return [output[0, len(prompt) :].tolist() for prompt, output in zip(prompts, outputs, strict=True)]


def answers(model: Any, prompts: list[list[int]], pages: dict[str, Any]) -> list[list[int]]:
    """What continuous batching answers."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    batching = ContinuousBatchingConfig(num_blocks=64, **pages)
    outputs = model.generate_batch(
        prompts, generation_config=GenerationConfig(**options), continuous_batching_config=batching
    )
    return [output.generated_tokens for output in outputs.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines; settings that are there are not run again")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--attention", nargs="+", choices=["sdpa", "eager"], default=["sdpa", "eager"])
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    prompts = make_prompts()
    rows: list[Row] = read_lines(options.out) if options.out is not None else []
    for architecture, attention, adapter in product(options.architectures, options.attention, ADAPTERS):
        setting = {"architecture": architecture, "attention": attention, "adapter": adapter}
        known = [row["pages"] for row in rows if row.items() >= setting.items()]
        if set(known) == set(PAGES):
            continue
        model = make_model(architecture, attention, adapter)
        expected = expected_answers(model, prompts)
        for pages in (pages for pages in PAGES if pages not in known):
            found = answers(model, prompts, PAGES[pages])
            right = sum(one == other for one, other in zip(found, expected, strict=False))
            rows.append({**setting, "pages": pages, "equal": right, "prompts": len(prompts)})
            print(json.dumps(rows[-1]), flush=True)
            if options.out is not None:
                append_line(options.out, rows[-1])
    for kind in ("LoRA", "TALAN"):
        of_kind = [row["equal"] == row["prompts"] for row in rows if (row["adapter"] == "LoRA") == (kind == "LoRA")]
        print(f"{kind}: {sum(of_kind)} of {len(of_kind)} settings equal")


if __name__ == "__main__":
    main()
