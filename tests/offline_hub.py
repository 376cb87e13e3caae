"""A hub cache with a tiny Qwen3 and a tokenizer with a chat template, for programs that ask for a model by its id."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

MODEL_ID = "Qwen/Qwen3-0.6B"
COMMIT = "0" * 40
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that it takes any text; ChatML as chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=SPECIAL,
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_model(folder: Path, depth: int = 28) -> None:
    """Write a Qwen3 with random weights and its tokenizer; by default as deep as the real model."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        # Multiples of 64, the block of 4-bit weights: bitsandbytes packs no others on processors with AVX512-BF16.
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_hub_cache(home: Path) -> None:
    """Fill a folder so that, as HF_HOME, it gives the model offline."""
    repository = home / "hub" / f"models--{MODEL_ID.replace('/', '--')}"
    save_tiny_model(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def write_far_answers(file: Path, count: int = 64) -> None:
    """Write a JSONL file of `prompt` and `completion` whose answers stand far back in the prompts."""
    text = "All of this was said before. " * 8
    rows = [{"prompt": f"It is {n}.\n{text}\nIt is", "completion": f" {n}"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_conversations(file: Path, count: int = 16) -> None:
    """Write a JSONL file of `messages`."""
    lines = []
    for number in range(count):
        question = {"role": "user", "content": f"What is {number} + 7?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": str(number + 7)}]}))
    file.write_text("\n".join(lines) + "\n")
