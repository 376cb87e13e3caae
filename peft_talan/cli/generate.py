"""`peft-talan generate`: prompts to text, with an adapter."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated

import typer
from typer import Argument, Option

from . import models
from .console import Misuse, stdout_kept_clean


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command line.
    """
    app.command(
        "generate",
        epilog="Examples: peft-talan generate outputs/demo/LoRA+TALAN 'What is 27 + 48?'  |  "
        "peft-talan generate user/adapter --json < prompts.txt",
    )(generate)


def generate(
    adapter: Annotated[str, Argument(help="The adapter's folder or hub id")],
    prompts: Annotated[list[str] | None, Argument(help="[default: the lines of stdin]")] = None,
    model: models.BaseModel = None,
    system: Annotated[str | None, Option(help="System message, for models with a chat template")] = None,
    chat: Annotated[bool | None, Option("--chat/--plain", help="Use the chat template [default: if any]")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer")] = 128,
    temperature: Annotated[float, Option(min=0.0, help="0: greedy")] = 0.0,
    strength: Annotated[float, Option(help="Of the side path: 1 as trained, 0 the low-rank half alone")] = 1.0,
    seed: Annotated[int, Option(help="Of sampling")] = 0,
    dtype: models.Dtype = "auto",
    device: models.Device = None,
    as_json: Annotated[bool, Option("--json", help="One JSON object a line: prompt and completion.")] = False,
) -> None:
    """Generate text with an adapter: one answer a prompt, on stdout."""
    asked = prompts or ([] if sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin if line.strip()])
    if not asked:
        raise Misuse("no prompt; give one in quotes, or lines on stdin")
    if not math.isfinite(strength):
        raise Misuse(f"--strength {strength}: give a finite number such as 0.5")
    with stdout_kept_clean():
        from peft_talan import set_talan_strength

        adapted, base = models.load_adapter(adapter, model, dtype, device)
        tokenizer = models.load_tokenizer(adapter, base)
        if chat and not tokenizer.chat_template:
            raise Misuse(f"--chat: the tokenizer of {base} has no chat template; use --plain")
        if strength != 1.0:
            set_talan_strength(adapted, strength)
        from transformers import GenerationConfig, pipeline, set_seed

        set_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        settings = GenerationConfig.from_model_config(adapted.config)
        settings.update(max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
        answer = pipeline("text-generation", model=adapted, tokenizer=tokenizer)
    as_chat = bool(tokenizer.chat_template) if chat is None else chat
    for prompt in asked:
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
        with stdout_kept_clean():
            found = answer(messages if as_chat else prompt, return_full_text=False, generation_config=settings)
        completion = found[0]["generated_text"]
        print(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) if as_json else completion)
