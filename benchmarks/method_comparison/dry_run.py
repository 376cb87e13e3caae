"""Goes through the steps of PEFT's MetaMathQA benchmark with an experiment's two files, on a tiny Llama.

    python -m benchmarks.method_comparison.dry_run
    python -m benchmarks.method_comparison.dry_run --experiment FOLDER --steps 40

PEFT's script asks for a GPU, the weights of Llama-3.2-3B and two data sets. The steps are the same here: the files are
read by PEFT; the loss on plain text, padded on the left; training on questions and answers, padded on the right, with
AdamW and a cosine; answers by `generate` with a static cache, padded on the left; the loss on plain text again; the
size of the saved adapter. The questions are sums of one-digit numbers. What is printed says nothing about a method.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

EXPERIMENT = Path(__file__).parent / "experiments" / "talan" / "llama-3.2-3B-rank32"
WORDS = ("<eos>", "Question:", "Answer:", "plus", "is", *map(str, range(19)))
DEFAULTS: dict[str, Any] = {"optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}, "grad_norm_clip": 1.0}
"""The training parameters that an experiment may replace, as far as they matter here."""
LONGEST = 24


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words, with the end token as padding, as Llama's is there."""
    words = Tokenizer(WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=WORDS[0], pad_token=WORDS[0])


def make_rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions of several lengths, and their answers."""
    numbers = torch.randint(0, 10, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(f"Question: {a} plus {b} {'is ' * (a % 3)}Answer:", f" {a + b}") for a, b in numbers]


def make_base(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A tiny Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads))


@torch.no_grad()
def text_loss(model: Any, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """The mean loss of a token of plain text, padded on the left."""
    batch = tokenizer.pad(tokenizer(texts), return_tensors="pt", padding_side="left")
    logits = model(**batch, pad_token_id=tokenizer.eos_token_id).logits
    # As there, each token is scored against itself, not against the next one.
    kept = batch["attention_mask"].bool()
    return float(F.cross_entropy(logits[kept], batch["input_ids"][kept]))


def train(model: Any, tokenizer: PreTrainedTokenizerFast, parameters: dict[str, Any], steps: int) -> list[float]:
    """Train, and return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), **parameters["optimizer_kwargs"])
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    losses = []
    model.train()
    for step in range(steps):
        texts = tokenizer([question + answer for question, answer in make_rows(4, step)])
        batch = tokenizer.pad(texts, return_tensors="pt", padding_side="right")
        labels = batch["input_ids"].clone()
        # The first end token after the text is learned, the others are padding.
        for row, mask in zip(labels, batch["attention_mask"], strict=True):
            row[int(mask.sum()) + 1 :] = -100
        loss = model(**batch, labels=labels, num_items_in_batch=int(batch["attention_mask"].sum())).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), parameters["grad_norm_clip"])
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.inference_mode()
def answers(model: Any, tokenizer: PreTrainedTokenizerFast, questions: list[str], cache: str | None) -> list[str]:
    """What the model says to each question."""
    batch = tokenizer.pad(tokenizer(questions), return_tensors="pt", padding_side="left")
    config = GenerationConfig(cache_implementation=cache, max_length=LONGEST)
    output = model.generate(**batch, generation_config=config, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.batch_decode(output, skip_special_tokens=True)


def run(experiment: Path, steps: int) -> dict[str, Any]:
    """Every step, and what PEFT's script would write down."""
    given = experiment / "training_params.json"
    parameters = {**DEFAULTS, **(json.loads(given.read_text()) if given.exists() else {})}
    tokenizer = make_tokenizer()
    model = get_peft_model(make_base(tokenizer), PeftConfig.from_pretrained(str(experiment))).eval()
    texts = [question + answer for question, answer in make_rows(8, seed=-1)]
    before = text_loss(model, tokenizer, texts)
    losses = train(model, tokenizer, parameters, steps)
    rows = make_rows(12, seed=-2)
    questions = [question for question, _ in rows]
    said = answers(model, tokenizer, questions, "static")
    right = sum(text == question + answer for text, (question, answer) in zip(said, rows, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return {
        "test accuracy": right / len(rows),
        "forgetting": text_loss(model, tokenizer, texts) - before,
        "train losses": losses,
        "file size": size,
        "trainable parameters": model.get_nb_trainable_parameters()[0],
        "same answers with a growing cache": said == answers(model, tokenizer, questions, None),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print and return what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT, help="folder with adapter_config.json")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    found = run(options.experiment, options.steps)
    print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
