"""`peft-talan generate`: prompts to text, with an adapter."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any

import typer
from typer import Argument, Option

from . import models
from .console import Misuse, is_given, note, print_json, stdout_kept_clean
from .sources import check_source

OF_PROMPTS = {
    "system": "--system",
    "chat": "--chat/--plain",
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "seed": "--seed",
}
"""Options that have nothing to say about rows."""


def generate(
    adapter: Annotated[str, Argument(help="Folder or hub id of an adapter of any PEFT method")],
    prompts: Annotated[list[str] | None, Argument(help="The prompts", show_default="the lines of stdin")] = None,
    data: Annotated[
        str | None,
        Option("--data", help="Rows as for training, whose right answers are counted, in place of prompts"),
    ] = None,
    model: models.BaseModel = None,
    system: Annotated[
        str | None, Option(help="System message of the chat template", show_default="as in training")
    ] = None,
    chat: Annotated[
        bool | None,
        Option(
            "--chat/--plain",
            help="Whether prompts go through the chat template",
            show_default="as in training; if that is not known, wherever there is a template",
        ),
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens")] = 128,
    temperature: Annotated[float, Option(min=0.0, help="Of sampling; 0 is greedy")] = 0.0,
    strength: Annotated[float, Option(help="Of the side path: 1 as trained, 0 LoRA weights only")] = 1.0,
    seed: Annotated[int, Option(help="Of sampling")] = 0,
    dtype: models.Dtype = "auto",
    device: models.Device = None,
    as_json: Annotated[
        bool,
        Option(
            "--json",
            help="One JSON object per line: prompt and completion; of --data one list, with all wrong answers",
        ),
    ] = False,
    *,
    context: typer.Context,
) -> None:
    """Generate text with an adapter: one answer per prompt, on stdout.

    An adapter that `peft-talan train` made gets prompts in the form that it was trained on.

    With --data it counts how many rows of 'prompt' and 'completion', or of 'messages', are answered right, by
    length: with the adapter, by its base model, and by that without its window, if it has one. It shows some wrong
    answers of the adapter; --json has all.
    """
    if data is not None:
        wrong = [option for name, option in OF_PROMPTS.items() if is_given(context, name)]
        if prompts or wrong:
            raise Misuse(f"--data: {' and '.join(wrong) or 'prompts'} can't be given with it; leave out one of both")
        check_source("--data", data, "dataset")
    elif not prompts and not sys.stdin.isatty():
        prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts and data is None:
        raise Misuse("no prompt; give one in quotes, or lines on stdin")
    if not math.isfinite(strength):
        raise Misuse(f"--strength {strength}: give a finite number such as 0.5")
    if system is not None and chat is False:
        raise Misuse("--system: plain prompts have no system message; leave out --plain or --system")
    kind = models.check_adapter(adapter, model, merged_too=True)
    models.check_place(dtype, device)
    if strength != 1.0 and kind not in ("TALAN", models.MERGED):
        raise Misuse(f"--strength {strength}: {adapter} is of type {kind} and has no side path")
    if data is not None:
        _count_right(data, (adapter, model, dtype, device), strength, as_json)
        return
    with stdout_kept_clean():
        from dataclasses import replace

        from transformers import set_seed

        from ..sft.models import answer
        from ..sft.prompts import PromptForm

        stored = PromptForm.load(adapter)
        adapted, tokenizer = _load((adapter, model, dtype, device), strength)
        form = stored or PromptForm(chat=bool(tokenizer.chat_template), generation_prompt=True)
        if chat is not None:
            form = replace(form, chat=chat, generation_prompt=form.generation_prompt or not form.chat)
        if system is not None:
            form = replace(form, system=system)
        if form.chat and not tokenizer.chat_template:
            raise Misuse("--chat: the tokenizer has no chat template; use --plain")
        if system is not None and not form.chat:
            raise Misuse(f"--system: {adapter} was trained on plain prompts; add --chat, or leave out --system")
        if stored and chat is None:
            note(f"prompts {'go through the chat template' if form.chat else 'are plain text'}, as in training")
        set_seed(seed)
    for prompt in prompts or ():
        with stdout_kept_clean():
            completion = answer(adapted, tokenizer, prompt, form, max_new_tokens, temperature)
        print(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) if as_json else completion)


def _load(source: tuple[str, str | None, str, str | None], strength: float) -> tuple[Any, Any]:
    """The model with the adapter, at a strength of its side path, and the tokenizer."""
    from ..sft.models import load_adapter
    from ..tuner.strength import set_talan_strength

    adapted, tokenizer = load_adapter(*source)
    if strength != 1.0:
        set_talan_strength(adapted, strength)
    return adapted, tokenizer


def _count_right(data: str, source: tuple[str, str | None, str, str | None], strength: float, as_json: bool) -> None:
    with stdout_kept_clean():
        from ..sft.data import read_rows
        from ..sft.display import make_console
        from ..sft.far_answers import count_right, right_answers_tables

        rows = read_rows(data)
        adapted, tokenizer = _load(source, strength)
        found = count_right(adapted, tokenizer, rows)
    if as_json:
        print_json(found)
    else:
        make_console().print(right_answers_tables(found, "all with --json"))
