"""Generation with a bounded cache: the key stands at the start of up to 100,000 tokens, which are fed in chunks.

    python -m benchmarks.memory.generation

A static cache of a window model holds the window's keys alone, and the side paths' sums beside them: the bytes are
counted after the last token. Results go to `benchmarks/results/memory_generation.jsonl`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, StaticCache

from peft_talan.demo.recall import SCORED_SEED, WINDOW, Training, make_texts
from peft_talan.sft.intervals import Interval

from ..measure import machine
from ..runs import append_line
from ..training import adapted
from .one_run import ARMS, STEPS, base_of, config_of, train

RESULTS = Path(__file__).parents[1] / "results" / "memory_generation.jsonl"
SETTINGS = ("rows", "seed", "chunk", "learning_rate", "steps")


def tensor_bytes(*tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def cache_bytes(cache: Cache) -> dict[str, int]:
    """The bytes of all tensors that a cache holds for one batch: keys and values, and the latent memories."""
    keys = sum(tensor_bytes(layer.keys, layer.values) for layer in cache.layers)
    memories = sum(tensor_bytes(*vars(memory).values()) for memory in getattr(cache, "latent_memories", ()))
    return {"keys_and_values": keys, "memories": memories}


@torch.no_grad()
def answer_in_chunks(model: Any, tokens: torch.Tensor, chunk: int) -> tuple[torch.Tensor, Cache]:
    """Feed texts through a static cache in chunks, and return the likeliest next tokens, [rows], and the cache."""
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 1)
    seen = 0
    for part in tqdm(tokens.split(chunk, dim=1), desc=f"{tokens.shape[1]} tokens", leave=False):
        positions = torch.arange(seen, seen + part.shape[1])[None]
        output = model(input_ids=part, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seen += part.shape[1]
    return output.logits[:, -1].argmax(-1), cache


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["LoRA", "TALAN, all blocks"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1_008, 10_000, 100_000])
    parser.add_argument("--chunk", type=int, default=400)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=STEPS["key"])
    parser.add_argument("--longest-trained", type=int, default=10, help="windows of the longest text in training")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    torch.set_num_threads(1)
    model, weights, _ = base_of("key", options.seed, "window")
    windows = tuple(range(1, options.longest_trained + 1))
    training = Training(options.steps, options.learning_rate, 16, windows, 1000 + options.seed)
    for arm in options.arms:
        torch.manual_seed(options.seed)
        with adapted(model, config_of(arm, model)) as tuned:
            train(tuned, "key", training)
            for length in options.tokens:
                generator = torch.Generator().manual_seed(SCORED_SEED + length)
                tokens, answers = make_texts("key", length // WINDOW, options.rows, generator)
                started = time.process_time()
                found, cache = answer_in_chunks(tuned, tokens, options.chunk)
                share = Interval.of_share(int((found == answers).sum()), options.rows)
                row = {
                    "arm": arm,
                    "tokens": tokens.shape[1],
                    "longest_trained": options.longest_trained,
                    "recall": [share.mean, share.low, share.high],
                    "bytes_a_row": {name: size // options.rows for name, size in cache_bytes(cache).items()},
                    "processor_seconds": round(time.process_time() - started, 1),
                    "settings": {name: getattr(options, name) for name in SETTINGS},
                    "weights": weights,
                    "machine": machine(),
                }
                append_line(options.results, row)
                print(arm, row["tokens"], row["recall"], row["bytes_a_row"], flush=True)


if __name__ == "__main__":
    main()
