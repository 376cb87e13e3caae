"""Answers about what stands before the attention window: side paths in all blocks of a sliding-window model.

A text begins with a key and ends with a question for it. A small model with a window of 16 tokens is first trained on
short texts, then fine-tuned on texts of up to 160 tokens, once with LoRA and once with LoRA and side paths. In two
blocks, attention reaches 30 tokens back; the latent memory holds the whole text. Printed are the share of right
answers at each length, and the size of the cache that generation needs: it does not grow with the text.

    pip install .
    python examples/long_context.py     # one minute on a CPU; downloads nothing
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from peft_talan import TalanConfig

WINDOW, BLOCKS, VOCABULARY = 16, 2, 64
BEGIN, KEY_COMES, ASK = 0, 1, 2
KEYS = range(3, 19)
LENGTHS = (16, 32, 64, 160, 320, 640)


def make_texts(length: int, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw texts: begin, a mark, the key, random words, and the question.

    Args:
        length: Tokens of a text.
        rows: How many texts.
        generator: What is drawn from.

    Returns:
        The texts, [rows, length], and their keys, [rows].
    """
    texts = torch.randint(KEYS.stop, VOCABULARY, (rows, length), generator=generator)
    keys = torch.randint(KEYS.start, KEYS.stop, (rows,), generator=generator)
    texts[:, 0], texts[:, 1], texts[:, 2], texts[:, -1] = BEGIN, KEY_COMES, keys, ASK
    return texts, keys


def train(model: Any, lengths: Sequence[int], steps: int, learning_rate: float) -> None:
    """Train what requires a gradient to answer with the key.

    Args:
        model: The model, with or without an adapter.
        lengths: Texts of a step have one of these lengths.
        steps: Optimizer steps of 32 texts.
        learning_rate: It falls to zero linearly.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for step in range(steps):
        texts, keys = make_texts(lengths[step % len(lengths)], 32, generator)
        loss = F.cross_entropy(model(texts, logits_to_keep=1, use_cache=False).logits[:, -1], keys)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def right_answers(model: Any, length: int) -> tuple[float, int]:
    """Generate the answers to 64 unseen texts.

    Args:
        model: The model, with or without an adapter.
        length: Tokens of a text.

    Returns:
        The share of right answers, and the bytes that the cache takes for one text.
    """
    texts, keys = make_texts(length, 64, torch.Generator().manual_seed(1_000_000 + length))
    # The default cache of a sliding-window model: the window, and each side path's memory of the whole text.
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": BEGIN}
    answers = model.generate(texts, attention_mask=torch.ones_like(texts), past_key_values=cache, **options)[:, -1]
    layers: list[Any] = cache.layers
    kept = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    kept += [memory.state for memory in getattr(cache, "latent_memories", ())]
    return float((answers == keys).float().mean()), sum(tensor.nbytes for tensor in kept) // len(texts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both and print the table.

    Args:
        arguments: Words of the command line. None: the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    options = parser.parse_args(arguments)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": BLOCKS, "head_dim": 16}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": WINDOW}
    no_ends: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    lora: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 8, "target_modules": "all-linear"}
    configs = {"LoRA": LoraConfig(**lora), "LoRA + TALAN": TalanConfig(**lora, talan_layers="all")}
    print(f"{'tokens of the text:':<20}", *(f"{length:>6}" for length in LENGTHS))
    for name, config in configs.items():
        torch.manual_seed(0)
        base = MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, **shape, **heads, **no_ends))
        train(base, (8, 12, WINDOW), options.steps, 3e-3)
        model = get_peft_model(base, config)
        train(model, (16, 32, 64, 96, 128, 160), options.steps, 1e-2)
        shares, sizes = zip(*(right_answers(model, length) for length in LENGTHS), strict=True)
        print(f"{name + ', right:':<20}", *(f"{share:>6.0%}" for share in shares))
        print(f"{'bytes of the cache:':<20}", *(f"{size:>6}" for size in sizes))


if __name__ == "__main__":
    main()
