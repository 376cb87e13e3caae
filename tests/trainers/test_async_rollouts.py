"""TRL's asynchronous trainers on what vLLM generates: each version of the adapter, side path and all.

vLLM's server runs in its own environment (`make test-vllm` makes it), TRL in this one. The kernel of TRL's attention
is computed by torch here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.async_distillation import AsyncDistillationConfig, AsyncDistillationTrainer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from peft_talan import TalanConfig, set_talan_strength

from ..vllm import engines
from ..vllm.servers import WITH_ADAPTERS, complete, post, serving
from .on_processors import run_on_processors
from .test_trl import COMMON, make_chat_tokenizer, words

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 3
PROMPTS = [{"prompt": [{"role": "user", "content": words(4 + 9 * number, number)}]} for number in range(4)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """It says how answers are read, as TRL asks it."""
    tokenizer = make_chat_tokenizer()
    content = {"close_pattern": "<eos>|$", "content": "text"}
    tokenizer.response_template = {
        "defaults": {"role": "assistant"}, "start_anchor": "<assistant> ", "fields": {"content": content}
    }  # fmt: skip
    return tokenizer


def make_base() -> PreTrainedModel:
    config = copy.deepcopy(engines.CONFIGS["qwen3"])
    config.vocab_size = len(make_tokenizer())
    return engines.make_base(config)


def make_adapter() -> TalanConfig:
    """A configuration whose two halves both change the output from the start."""
    shared = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return TalanConfig(**shared, talan_layers=[1, -1], init_talan_weights=False)


def count_words(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells completions apart."""
    return [float(len(set(ids))) + 0.1 * max(ids) for ids in completion_ids]


class Compare(TrainerCallback):
    """Asks the server for the version that a step trains on, and `generate` with the adapter as it is."""

    def __init__(self, port: int, folder: Path, out: Path) -> None:
        self.port, self.base, self.out = port, folder / "base", out / "now"
        self.trainer: Any = None
        self.asked: list[tuple[list[list[int]], list[list[int]]]] = []

    def on_step_begin(self, *_: object, model: Any, **__: object) -> None:
        prompts = [[2, *range(4, 4 + number), 1, 3] for number in (5, 40)]
        model.save_pretrained(self.out)
        served = complete(self.port, f"trl-policy-v{self.trainer.model_version}", prompts)
        self.asked.append((served, engines.generate(self.base, prompts, adapter=self.out)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    make_base().save_pretrained(path / "base")
    make_tokenizer().save_pretrained(path / "base")
    get_peft_model(make_base(), make_adapter()).save_pretrained(path / "like")
    return path


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Iterator[int]:
    """The server of what the student is before its training."""
    student = PeftModel.from_pretrained(make_base(), folder / "like")
    student.merge_and_unload().save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    words = ["--logprobs-mode", "processed_logprobs"]
    with serving(folder / "teacher", words, folder / "printed by the teacher", str(PYTHON)) as port:
        yield port


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[int]:
    words = [*WITH_ADAPTERS, "--max-loras", 3, "--lora-modules", f"like={folder / 'like'}"]
    with serving(folder / "base", words, folder / "printed", str(PYTHON), VLLM_SERVER_DEV_MODE="1") as port:
        yield port


@pytest.fixture
def port(server: int) -> Iterator[int]:
    """The server, from which each test's versions go: TRL gives them the same names in every run."""
    yield server
    for model in json.loads(post(server, "/v1/models", None)[1])["data"]:
        if model["id"].startswith("trl-policy"):
            assert post(server, "/v1/unload_lora_adapter", {"lora_name": model["id"]})[0] == 200


def make_trainer(folder: Path, port: int, out: Path, token_budget: int | None = None, **options: Any) -> Any:
    arguments = AsyncGRPOConfig(
        out,
        **COMMON,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=12,
        max_staleness=0,
        learning_rate=0.02,
        dtype="float32",
        token_budget=token_budget,
        vllm_server_base_url=f"http://127.0.0.1:{port}",
    )
    return AsyncGRPOTrainer(
        str(folder / "base"),
        reward_funcs=count_words,
        args=arguments,
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=make_tokenizer(),
        peft_config=make_adapter(),
        **options,
    )


needs_vllm = pytest.mark.skipif(
    not (PYTHON.parents[1] / ".test").exists(),
    reason="vLLM is installed in an environment of its own: make test-vllm",
)


def train(trainer: Any, compare: Compare) -> list[dict[str, float]]:
    """Train, and see that the server had each version that a step trained on; gives the steps' logs."""
    trainer.train()
    assert len(compare.asked) == STEPS
    for served, expected in compare.asked:
        assert served == expected
    assert all(one != other for (one, _), (other, _) in zip(compare.asked, compare.asked[1:], strict=False))
    steps = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(steps) == STEPS
    assert all(row["grad_norm"] > 0 for row in steps)
    return steps


@needs_vllm
def test_each_version_is_what_is_trained(
    folder: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_processors(monkeypatch)
    compare = Compare(port, folder, tmp_path)
    trainer = compare.trainer = make_trainer(folder, port, tmp_path, callbacks=[compare])
    steps = train(trainer, compare)
    # Of vLLM's probabilities and the trainer's. TRL takes the next step's rollouts before it sends new weights.
    assert steps[0]["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    trainer.model.merge_adapter()  # as before the training
    trainer.model.unmerge_adapter()


@needs_vllm
def test_distillation_from_what_the_student_was(
    folder: Path, port: int, teacher: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rollouts show that the trainer has the probabilities of vLLM, of which the teacher is another one."""
    run_on_processors(monkeypatch)
    compare = Compare(port, folder, tmp_path)
    arguments = AsyncDistillationConfig(
        tmp_path,
        **COMMON,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        max_completion_length=12,
        max_staleness=0,
        learning_rate=0.02,
        dtype="float32",
        model_init_kwargs={"attn_implementation": "eager"},
        vllm_server_base_url=f"http://127.0.0.1:{port}",
        teacher_server_urls={"default": f"http://127.0.0.1:{teacher}"},
    )
    trainer = compare.trainer = AsyncDistillationTrainer(
        str(folder / "base"),
        args=arguments,
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=make_tokenizer(),
        peft_config=make_adapter(),
        callbacks=[compare],
    )
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(folder / "like")))
    steps = train(trainer, compare)
    assert steps[0]["jsd"] == pytest.approx(0.0, abs=1e-6)
    assert all(row["jsd"] > 0.01 for row in steps[1:])


class Sender:
    """A user's own way to send weights, for which TRL merges the adapter and asks no server."""

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...
    def send_weights(self, iterator: Any) -> None:
        raise AssertionError("weights were sent")


def test_an_adapter_that_trl_would_merge_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first rollout; nothing is merged."""
    run_on_processors(monkeypatch)
    trainer = make_trainer(folder, 9, tmp_path, token_budget=0, weight_transfer=Sender())
    with pytest.raises(ValueError, match=r"AsyncGRPOConfig: merged weights are without the side path"):
        trainer.train()
    assert not any(getattr(module, "merged", False) for module in trainer.model.modules())


def test_a_strength_that_vllm_does_not_know_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_processors(monkeypatch)
    trainer = make_trainer(folder, 9, tmp_path, token_budget=0, weight_transfer=Sender())
    set_talan_strength(trainer.model, 0.5)
    with pytest.raises(ValueError, match=r"AsyncGRPOConfig: adapter 'default' has the strength 0.5"):
        trainer.train()
