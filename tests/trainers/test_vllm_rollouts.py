"""TRL's trainers that send vLLM merged weights are refused a TALAN adapter as they are made; others ask for vLLM."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftConfig
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from ..small_models import make_base, make_config, make_lora_config, make_model, make_tokens
from .on_processors import run_on_processors
from .test_trl import COMMON, PAIRS, make_chat_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

REWARDED = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
TAUGHT = {"teacher_model": "teacher"}
PROMPTS = [{"prompt": [{"role": "user", "content": question}]} for question, _ in PAIRS]
CHATS = [{"messages": [*row["prompt"], {"role": "assistant", "content": answer}]}
         for row, (_, answer) in zip(PROMPTS, PAIRS, strict=True)]  # fmt: skip
HINTED = [{**row, "privileged_context": answer} for row, (_, answer) in zip(PROMPTS, PAIRS, strict=True)]
TOKENS = [{"input_ids": row} for row in make_tokens().tolist()]
EAGER = {"model_init_kwargs": {"attn_implementation": "eager"}}
SERVER = {"teacher_model_server_url": "http://127.0.0.1:9"}
TRAINERS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "trl.GRPO": (PROMPTS, REWARDED, {}),
    "trl.RLOO": (PROMPTS, REWARDED, {}),
    "trl.Distillation": (PROMPTS, TAUGHT, {}),
    "trl.experimental.async_distillation.AsyncDistillation": (PROMPTS, {}, EAGER),
    "trl.experimental.async_grpo.AsyncGRPO": (PROMPTS, REWARDED, {}),
    "trl.experimental.gmpo.GMPO": (PROMPTS, REWARDED, {}),
    "trl.experimental.gold.GOLD": (TOKENS, TAUGHT, {}),
    "trl.experimental.iw_opd.IWOPD": (CHATS, TAUGHT, {}),
    "trl.experimental.online_dpo.OnlineDPO": (PROMPTS, REWARDED, {}),
    "trl.experimental.sdft.SDFT": (HINTED, {}, {}),
    "trl.experimental.sdpo.SDPO": (HINTED, REWARDED, {}),
    "trl.experimental.server_distillation.ServerDistillation": (PROMPTS, {}, SERVER),
}
"""Each trainer's data, arguments and options, by the module and the beginning of its name."""
BY_REWARDS = {"num_generations": 2, "per_device_train_batch_size": 2}


def find(name: str) -> tuple[type, type[TrainingArguments]]:
    module, _, kind = name.rpartition(".")
    package = importlib.import_module(module)
    return getattr(package, f"{kind}Trainer"), getattr(package, f"{kind}Config")


def make(name: str, folder: Path, adapter: PeftConfig, **given: Any) -> Any:
    """Make a trainer of a base model in a folder."""
    trainer, config = find(name)
    rows, arguments, options = TRAINERS[name]
    for part in ("base", "teacher"):
        make_base("qwen3", torch.float32).save_pretrained(folder / part)
        make_chat_tokenizer().save_pretrained(folder / part)
    placed = {key: str(folder / value) if value == "teacher" else value for key, value in arguments.items()}
    fields = inspect.signature(config).parameters
    by_rewards = {key: value for key, value in BY_REWARDS.items() if "reward_funcs" in arguments and key in fields}
    return trainer(
        str(folder / "base"),
        **placed,
        args=config(str(folder / "out"), **COMMON, **by_rewards, **options, **given),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_chat_tokenizer(),
        peft_config=adapter,
    )


def test_every_trainer_that_knows_vllm_is_tried() -> None:
    found = set()
    for _, module, _ in pkgutil.walk_packages(trl.__path__, "trl."):
        if module.endswith("_config"):
            for kind, config in vars(importlib.import_module(module)).items():
                if re.fullmatch(r"[A-Z]\w+Config", kind) and hasattr(config, "vllm_server_base_url"):
                    found.add(kind.removesuffix("Config"))
    assert found == {name.rpartition(".")[2] for name in TRAINERS}


ASYNCHRONOUS = [name for name in TRAINERS if ".async_" in name]
"""They send the adapter as it is; `test_async_rollouts.py` has them train."""


@pytest.mark.parametrize("name", [name for name in TRAINERS if name not in ASYNCHRONOUS])
def test_a_trainer_that_generates_by_vllm_is_refused(name: str, tmp_path: Path) -> None:
    named = re.escape(f"{find(name)[1].__name__}(use_vllm=True)")
    with pytest.raises(ValueError, match=rf"{named}: .*without its side path.*set use_vllm=False.*--enable-lora"):
        make(name, tmp_path, make_config(), use_vllm=True)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_an_asynchronous_trainer_asks_for_the_server(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_processors(monkeypatch)
    assert not hasattr(find(name)[1], "use_vllm")
    nowhere = {"vllm_server_base_url": "http://127.0.0.1:9", "vllm_server_timeout": 0.1}
    with pytest.raises(TimeoutError, match="waiting for vLLM server"):
        make(name, tmp_path, make_config(), **nowhere)


def test_plain_lora_and_other_ways_to_generate_are_let_through(tmp_path: Path) -> None:
    make("trl.GRPO", tmp_path, make_config())
    make("trl.GRPO", tmp_path, make_config(), use_transformers_continuous_batching=True)
    with pytest.raises(ImportError, match="vLLM is not available"):
        make("trl.GRPO", tmp_path, make_lora_config(), use_vllm=True)


def test_a_model_that_has_its_adapter_already_is_refused(tmp_path: Path) -> None:
    options = GRPOConfig(tmp_path, **COMMON, **BY_REWARDS, use_vllm=True)
    data = {"train_dataset": Dataset.from_list(PROMPTS), "processing_class": make_chat_tokenizer()}
    with pytest.raises(ValueError, match=r"GRPOConfig\(use_vllm=True\)"):
        GRPOTrainer(make_model("qwen3", dtype=torch.float32), args=options, **REWARDED, **data)
