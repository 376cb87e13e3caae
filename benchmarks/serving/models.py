"""Writes what the servers serve, and asks `generate` for the answers that they have to give."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, NamedTuple

from .servers import RANK, Served

TOPICS = (
    "the sea", "a bridge", "bread", "the moon", "a clock", "ants", "the violin", "rain",
    "glass", "a lighthouse", "salt", "the desert", "a ladder", "owls", "paper", "iron",
)  # fmt: skip
MERGED = {"talan_alpha": 0.3, "init_talan_weights": False}
"""Strong enough to change answers, and weak enough for them to stay language."""
BY_REQUEST = {"talan_alpha": 1.0, "init_talan_weights": False}
"""The same beside LoRA weights that change answers, too."""
ADAPTERS = 8
"""Of a server: half of them have a side path in one server, and none in the others."""


class Question(NamedTuple):
    """The name in a request of a model or an adapter, and the topic that it is asked about."""

    model: str
    topic: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """One prompt; the prompts share their beginning, as system prompts do."""
        text = f"You are a patient teacher. Tell a child in two sentences about {self.topic}."
        return [{"role": "user", "content": text}]


Answers = dict[Question, str]


def ask_about(served: Served, requests: int) -> list[Question]:
    """As many questions, in turn for each model or adapter of a server."""
    models = served.models
    return [
        Question(models[number % len(models)], TOPICS[number // len(models) % len(TOPICS)])
        for number in range(requests)
    ]


def _adapted(config: Any, seed: int) -> Any:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_talan.demo.base_model import default_model_folder

    base = AutoModelForCausalLM.from_pretrained(default_model_folder(), dtype=torch.float32)
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def _save_tokenizer(folder: str) -> None:
    from transformers import AutoTokenizer

    from peft_talan.demo.base_model import default_model_folder

    AutoTokenizer.from_pretrained(default_model_folder()).save_pretrained(folder)


def write_folders(parent: Path) -> dict[str, Served]:
    """Write the merged model with its side path, and without it; done once."""
    from peft_talan import TalanConfig

    served = {name: Served(str(parent / name)) for name in ("talan", "lora")}
    if not all(Path(one.folder, "config.json").exists() for one in served.values()):
        for name, one in served.items():
            shared = {"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            model = _adapted(TalanConfig(**shared, **MERGED), 0)
            with warnings.catch_warnings(action="ignore"):  # of the side path that is dropped
                merged = model.merge_and_unload(side_path="keep" if name == "talan" else "drop")
            merged.save_pretrained(one.folder)
            _save_tokenizer(one.folder)
    return served


def write_adapters(parent: Path) -> dict[str, Served]:
    """Write adapters, done once: half of them with a side path, and all without."""
    from peft import LoraConfig

    from peft_talan import TalanConfig
    from peft_talan.demo.base_model import default_model_folder

    half, base = ADAPTERS // 2, default_model_folder()
    # By its number an adapter has the LoRA weights of the same number's without a side path.
    seeds = {f"talan-{number}": number for number in range(half)}
    seeds |= {f"lora-{number}": number for number in range(ADAPTERS)}
    folders = {name: str(parent / name) for name in seeds}
    for name, folder in folders.items():
        if not Path(folder, "adapter_config.json").exists():
            shared: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "init_lora_weights": False}
            shared |= {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            config = LoraConfig(**shared) if name.startswith("lora") else TalanConfig(**shared, **BY_REQUEST)
            _adapted(config, seeds[name]).save_pretrained(folder)
    plain = {name: folder for name, folder in folders.items() if name.startswith("lora")}
    mixed = {name: folder for name, folder in folders.items() if name.startswith("talan")}
    mixed |= dict([*plain.items()][half:])
    return {"talan": Served(base, mixed), "lora": Served(base, plain)}


def expected_answers(served: Served, questions: Iterable[Question], tokens: int) -> Answers:
    """What `generate` answers to each question alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.folder)
    answers: Answers = {}
    for name, asked in groupby(sorted(set(questions)), key=lambda question: question.model):
        model = AutoModelForCausalLM.from_pretrained(served.folder, dtype=torch.float32)
        if name in served.adapters:
            model = PeftModel.from_pretrained(model, served.adapters[name])
        for question in asked:
            inputs = tokenizer.apply_chat_template(
                question.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            output = model.eval().generate(**inputs, max_new_tokens=tokens, do_sample=False)
            answer = output[0, inputs["input_ids"].shape[1] :]
            answers[question] = tokenizer.decode(answer, skip_special_tokens=True)
    return answers


def check_apart(answers: Answers) -> None:
    """Refuse models of which two answer alike: no answer would show which of them gave it."""
    for one, other in combinations(sorted({question.model for question in answers}), 2):
        pairs = [
            (text, answers.get(Question(other, topic))) for (model, topic), text in answers.items() if model == one
        ]
        if all(text == another for text, another in pairs):
            raise RuntimeError(f"{one} and {other} give the same answers; ask more, or give them other weights")
