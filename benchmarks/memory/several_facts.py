"""Several facts in a text, SmolLM2 with a window: which of them a question far behind them is about.

    python -m benchmarks.memory.several_facts --seeds 0 1 2
    python -m benchmarks.memory.several_facts --page docs/evidence.md

A row is the facts, a piece of a text, and a question about each fact, one after another; the loss is that of the
answers and, with a small weight, of the rest. The side paths are of the `delta` mixer and start by
`initialize_talan_recall`, from keys by which a question matches the place of its answer. Scored are rows of the parts
of the texts that aren't trained on, with other pairs of the same names and places and one question, by length in
windows; an answer is right if greedy decoding gives all of its tokens and its end. Every run is a line of the results,
and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig

from peft_talan import TalanConfig
from peft_talan.demo.base_model import default_model_folder
from peft_talan.sft import prompts
from peft_talan.sft.models import load_tokenizer
from peft_talan.sft.scores import default_text, score_rows, text_loss
from peft_talan.sft.training import PromptLossTrainer, start_from_data
from peft_talan.sft.window import with_sliding_window

from ..measure import code_version, machine
from ..pages import columns_table, show
from ..runs import Row, RunSettings, finished, read_lines, run_missing
from .ordinary_rows import Printed
from .recall_tasks import TaskRows

RESULTS = Path(__file__).parents[1] / "results" / "memory_several_facts.jsonl"
ARMS = ("TALAN", "LoRA")
BLOCKS = (16, 17, 19, 22, 25)
"""Of 30: in the first two the questions can be told apart, in the others what has been read is written again."""


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that a run depends on.

    Args:
        arm: One of `ARMS`.
        seed: Of the adapter, the rows and their order.
        facts: How many a text has.
        questions: How many follow in a row of training.
        window: Keys that a token sees.
        steps: Optimizer steps.
        batch_size: Rows a step.
        shortest: The shortest row in tokens, with its first question.
        longest: The longest such row.
        learning_rate: The highest; it falls linearly.
        prompt_loss_weight: Of the tokens that aren't answers.
        rank: Of the low-rank adapter; its alpha is twice the rank.
        blocks: Those with side paths.
        slots: The length of a key.
        scored: The lengths that are scored, in windows.
        rows: Held-out rows of each length.
        bf16: Whether products are rounded to bfloat16 in training.
    """

    arm: str
    seed: int
    facts: int = 4
    questions: int = 4
    window: int = 32
    steps: int = 300
    batch_size: int = 4
    shortest: int = 70
    longest: int = 140
    learning_rate: float = 3e-4
    prompt_loss_weight: float = 0.2
    rank: int = 16
    blocks: tuple[int, ...] = BLOCKS
    slots: int = 16
    scored: tuple[int, ...] = (2, 4, 10)
    rows: int = 48
    bf16: bool = True


def encode(row: dict[str, Any], settings: Settings, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> Row:
    """The tokens of a row with its questions, and which are those of answers and their ends."""
    lines = row["prompt"].split("\n")
    first = lines[-1].removesuffix(" is")
    told = [line.removesuffix(".").split(" is ") for line in lines[: settings.facts]]
    others = [fact for fact in told if fact[0] != first]
    draw.shuffle(others)
    asked = [(row["prompt"], row["completion"])]
    asked += [(f"\n{subject} is", f" {answer}") for subject, answer in others[: settings.questions - 1]]
    ids: list[int] = []
    mask: list[int] = []
    for question, answer in asked:
        prompt, completion = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (question, answer))
        completion = [*completion, tokenizer.eos_token_id]
        ids += [*prompt, *completion]
        mask += [0] * len(prompt) + [1] * len(completion)
    return {"input_ids": ids, "completion_mask": mask}


def run(settings: Settings, folder: str) -> Row:
    """Train and score once, on one thread."""
    torch.set_num_threads(1)
    tokenizer, task = load_tokenizer(folder), f"{settings.facts} facts"
    made = TaskRows(tokenizer, held_out=False).rows(
        task, settings.steps * settings.batch_size, settings.shortest, settings.longest, settings.seed + 10
    )
    draw = random.Random(settings.seed)
    rows = [encode(row, settings, tokenizer, draw) for row in made]
    adapter = {"r": settings.rank, "lora_alpha": 2 * settings.rank, "target_modules": "all-linear"}
    axes = {"talan_layers": list(settings.blocks), "talan_mixer": "delta", "talan_slots": settings.slots}
    config = LoraConfig(task_type="CAUSAL_LM", **adapter)
    if settings.arm == "TALAN":
        config = TalanConfig(task_type="CAUSAL_LM", **adapter, **axes, talan_writeback="gated")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as output:
        trainer = PromptLossTrainer(
            with_sliding_window(model, settings.window),
            SFTConfig(
                output,
                completion_only_loss=True,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                warmup_steps=0.03,
                seed=settings.seed,
                bf16=settings.bf16,
                use_cpu=not torch.accelerator.is_available(),
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[Printed()],
            prompt_loss_weight=settings.prompt_loss_weight,
        )
        if settings.arm == "TALAN":
            start_from_data(trainer, lambda line: print(line, flush=True))
        # The loss and the gradients of padded rows, without the time that padding takes.
        trainer.data_collator.padding_free = True
        trainer.train()
    seconds = time.monotonic() - began
    trained, history = trainer.model.eval(), [entry for entry in trainer.state.log_history if "loss" in entry]
    held_out, right = TaskRows(tokenizer, held_out=True), {}
    for windows in settings.scored:
        tokens = windows * settings.window
        asked = [prompts.encode(tokenizer, row) for row in held_out.rows(task, settings.rows, tokens, tokens, 1)]
        scores = score_rows(trained, tokenizer, asked, batch_size=4)
        right[windows] = sum(scores.exact)
    return {
        "key": settings.key(),
        "settings": asdict(settings),
        "right": right,
        "text_loss": text_loss(trained, tokenizer, default_text()),
        "losses": [round(float(entry["completion_loss"]), 3) for entry in history],
        "trainable": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
        "code": code_version(),
        "machine": machine(),
    }


def table(rows: Sequence[Row]) -> str:
    """The runs of the settings above, one a line; those of others are stored alone."""

    def of_the_defaults(row: Row) -> bool:
        return Settings(**{name: row["settings"][name] for name in ("arm", "seed", "facts")}).key() == row["key"]

    def loss_at(step: int) -> Any:
        return lambda row: f"{sum(row['losses'][step - 10 : step]) / 10:.2f}"

    def right_at(windows: int) -> Any:
        return lambda row: f"{row['right'][str(windows)]} of {row['settings']['rows']}"

    columns = {
        **{name: lambda row, name=name: row["settings"][name] for name in ("arm", "facts", "seed")},
        **{f"loss of the answers, step {step}": loss_at(step) for step in (20, 50, 100, 200, 300)},
        **{f"{windows} windows": right_at(windows) for windows in Settings.scored},
        "plain text, nats a token": lambda row: f"{row['text_loss']:.1f}",
        "minutes": lambda row: round(row["seconds"] / 60),
    }
    shown = filter(of_the_defaults, rows)
    return columns_table(columns, sorted(shown, key=lambda row: (row["settings"]["arm"], row["settings"]["seed"])))


def describe(row: Row) -> str:
    """A run with its right answers by length."""
    return f"{row['settings']['arm']} {row['settings']['seed']}: {row['right']} {row['losses'][-1]:.3f}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or a hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["TALAN"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--changes", type=json.loads, default={}, help="other settings, as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="puts a table of the stored runs into a page")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    if options.page:
        show({"memory several facts": table(read_lines(options.results))}, options.page)
        return
    folder, done = options.model or default_model_folder(), finished(options.results)
    wanted = [Settings(arm, seed, **options.changes) for seed in options.seeds for arm in options.arms]
    run_missing(
        lambda: [settings for settings in wanted if settings.key() not in done],
        lambda settings: run(settings, folder),
        options.results,
        done,
        describe,
    )


if __name__ == "__main__":
    main()
