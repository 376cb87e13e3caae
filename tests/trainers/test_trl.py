"""TRL's trainers as they are: batches of every layout, losses of every kind, references, rollouts, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_talan import talan_param_groups
from peft_talan.sft.training import PromptLossTrainer

from ..small_models import VOCABULARY, make_base, make_config, make_model

SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")
CHAT = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' <eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    words = dict.fromkeys([*SPECIAL, *(f"w{word}" for word in range(len(SPECIAL), VOCABULARY))])
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", eos_token="<eos>", chat_template=CHAT
    )


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{word}" for word in torch.randint(4, VOCABULARY, (count,), generator=generator).tolist())


LENGTHS = ((3, 4), (1, 1), (9, 2), (2, 11), (5, 5), (1, 7))
"""Words of question and answer of each sample."""
PAIRS = [(words(asked, 2 * i), words(told, 2 * i + 1)) for i, (asked, told) in enumerate(LENGTHS)]
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in PAIRS
]
DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": ([{"text": f"{question} {answer} "} for question, answer in PAIRS], {}),
    "completion": ([{"prompt": f"{question} ", "completion": f"{answer} "} for question, answer in PAIRS], {}),
    "chat": ([{"messages": chat} for chat in CHATS], {}),
    "assistant": ([{"messages": chat} for chat in CHATS], {"assistant_only_loss": True}),
    "chat completion": ([{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS], {}),
}
TOGETHER = {"per_device_train_batch_size": len(PAIRS)}
ALONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(PAIRS)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": TOGETHER,
    "padding_free": {**TOGETHER, "padding_free": True, "max_length": None},
    "packed": {**TOGETHER, "packing": True, "max_length": 24},
}
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


class KeptGradients(TrainerCallback):
    """Keeps what reached the optimizer."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: object, model: PeftModel, **kwargs: object) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sft_step(
    folder: Path,
    kind: str,
    layout: dict[str, Any],
    architecture: str = "qwen3",
    prompt_loss_weight: float | None = None,
    **options: Any,
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one step of all samples, in float64."""
    rows, of_kind = DATA[kind]
    weight = {} if prompt_loss_weight is None else {"prompt_loss_weight": prompt_loss_weight}
    trainer_of: Any = SFTTrainer if prompt_loss_weight is None else PromptLossTrainer
    kept = KeptGradients()
    arguments = SFTConfig(folder, **{**COMMON, "max_steps": 1, "max_grad_norm": 0.0, **of_kind, **layout, **options})
    trainer = trainer_of(
        make_base(architecture),
        arguments,
        **weight,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_chat_tokenizer(),
        peft_config=make_config(),
        callbacks=[kept],
    )
    # PEFT keeps adapters in float32; exact comparisons need the model's own precision.
    trainer.model.to(torch.float64).load_state_dict(make_model(architecture).state_dict())
    trainer.train()
    return trainer.state.log_history[0]["loss"], kept.gradients


def assert_same(
    found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]], roundings: int = 8
) -> None:
    # TRL computes log-probabilities and their gradients in float32, whatever the model's dtype.
    tolerance = roundings * torch.finfo(torch.float32).eps
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    assert any(".talan." in name for name in found[1])
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[1][name] / scale, gradient / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("architecture_", ["qwen3", "llama"])
def test_batches_of_every_layout_train_as_single_samples(
    architecture_: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    alone = sft_step(tmp_path, "text", ALONE, architecture_)
    for layout, options in LAYOUTS.items():
        with subtests.test(layout=layout):
            assert_same(sft_step(tmp_path, "text", options, architecture_), alone)
    # What this would see if segments were ignored: TRL's `wrapped` strategy joins samples on purpose.
    joined = sft_step(tmp_path, "text", {**LAYOUTS["packed"], "packing_strategy": "wrapped", "max_length": 70})
    with pytest.raises(AssertionError):
        assert_same(joined, alone)


def test_layouts_with_completions_and_checkpointing(tmp_path: Path, subtests: pytest.Subtests) -> None:
    alone = sft_step(tmp_path, "completion", ALONE)
    for layout, options in LAYOUTS.items():
        with subtests.test(layout=layout):
            assert_same(sft_step(tmp_path, "completion", options, gradient_checkpointing=True), alone)


@pytest.mark.parametrize("kind", DATA)
def test_loss_is_that_of_the_tokens_it_should_count(kind: str, tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer()
    model = make_model("qwen3")
    losses = []
    for question, answer in PAIRS:
        chat = kind in ("chat", "assistant", "chat completion")
        prompt = tokenizer(f"<user> {question} <eos> <assistant>" if chat else question)["input_ids"]
        completion = tokenizer(f"{answer} <eos>")["input_ids"]
        tokens = torch.tensor([*prompt, *completion])
        labels = tokens.clone()
        if kind in ("completion", "assistant", "chat completion"):
            labels[: len(prompt)] = -100
        logits = model(tokens[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] != -100])
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(sft_step(tmp_path, kind, TOGETHER), (float(loss), gradients))


@pytest.mark.parametrize("layout", [*LAYOUTS, "alone"])
def test_prompts_count_with_their_weight(layout: str, tmp_path: Path) -> None:
    tokenizer, model = make_chat_tokenizer(), make_model("qwen3")
    told, asked = [], []
    for question, answer in PAIRS:
        prompt, completion = tokenizer(question)["input_ids"], tokenizer(f"{answer} <eos>")["input_ids"]
        tokens = torch.tensor([*prompt, *completion])
        losses = F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        asked.append(losses[: len(prompt) - 1])
        told.append(losses[len(prompt) - 1 :])
    # Each batch of a step has a mean of its own.
    batches = asked if layout == "alone" else [torch.cat(asked)]
    prompts = sum(batch.mean() for batch in batches if len(batch)) / len(batches)
    loss = torch.cat(told).mean() + 0.5 * prompts
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    options = ALONE if layout == "alone" else LAYOUTS[layout]
    found = sft_step(tmp_path, "completion", options, prompt_loss_weight=0.5)
    # A slot's bias gets a small difference of what many more tokens give.
    assert_same(found, (float(loss), gradients), roundings=16)


@pytest.mark.parametrize(
    ("options", "given", "named"),
    [
        ({"loss_type": "dft"}, {}, "loss_type='dft': .* needs 'nll'"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1: .* needs 0.0"),
        ({}, {"compute_loss_func": len}, "compute_loss_func=<.*>: .* needs None"),
    ],
)
def test_prompts_have_a_weight_beside_the_usual_loss_alone(
    options: dict[str, Any], given: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model, arguments = make_base("qwen3", torch.float32), SFTConfig(tmp_path, **COMMON, **options)
    rows = Dataset.from_list(DATA["completion"][0])
    data = {"train_dataset": rows, "processing_class": make_chat_tokenizer(), "peft_config": make_config(), **given}
    with pytest.raises(ValueError, match=f"{named}; give that, or a weight of 0"):
        PromptLossTrainer(model, arguments, **data, prompt_loss_weight=0.5)
    assert not any("lora" in name for name, _ in model.named_parameters())
    PromptLossTrainer(model, arguments, **data)


PREFERENCES = [
    {"prompt": f"{question} ", "chosen": f"{answer} ", "rejected": f"{words(3, 50 + i)} "}
    for i, (question, answer) in enumerate(PAIRS)
]


def dpo(folder: Path, model: Any, steps: int = 3, **given: Any) -> DPOTrainer:
    torch.manual_seed(1)
    arguments = DPOConfig(folder, **COMMON, max_steps=steps, per_device_train_batch_size=3, learning_rate=1e-3)
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=make_chat_tokenizer(),
        **given,
    )
    trainer.train()
    return trainer


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, parameter), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def test_dpo_takes_its_reference_from_disabled_adapters(tmp_path: Path) -> None:
    disabled = dpo(tmp_path, make_base("qwen3", torch.float32), peft_config=make_config())
    assert disabled.ref_model is None
    untouched = make_base("qwen3", torch.float32)
    explicit = dpo(tmp_path, make_base("qwen3", torch.float32), peft_config=make_config(), ref_model=untouched)
    assert_equal_weights(disabled.model, explicit.model)
    batch = next(iter(disabled.get_train_dataloader()))
    found = disabled.compute_ref_log_probs(disabled.model, batch)
    expected = explicit.compute_ref_log_probs(untouched, batch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    torch.manual_seed(1)
    fresh = dict(make_model("qwen3", dtype=torch.float32).named_parameters())
    trained = {name for name, p in disabled.model.named_parameters() if not torch.equal(p, fresh[name])}
    assert trained == {name for name in fresh if "lora_" in name}


def test_dpo_copies_a_trained_adapter_into_its_reference(tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(talan_mixer="mlp", talan_writeback="gated", use_dora=True), torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters() if ".default." in name}
    assert any(".talan." in name for name in before)
    trainer = dpo(tmp_path, model)
    first = trainer.state.log_history[0]
    # Before the first step policy and reference are one.
    assert (first["rewards/chosen"], first["rewards/rejected"]) == (0.0, 0.0)
    assert trainer.state.log_history[2]["rewards/chosen"] != 0.0
    for name, parameter in before.items():
        assert torch.equal(model.get_parameter(name.replace(".default.", ".ref.")), parameter), name
        assert not torch.equal(model.get_parameter(name), parameter), name


PAGED = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"page_size": 4, "num_blocks": 32, "max_batch_tokens": 16},
}


@pytest.mark.parametrize(("checkpointing", "rollout"), [(False, {}), (True, {}), (True, PAGED)])
def test_grpo_rolls_out_what_the_model_says(checkpointing: bool, rollout: dict[str, Any], tmp_path: Path) -> None:
    """Prompts of several lengths are padded on the left or paged, and continued by the weights of each step."""
    rollouts: list[tuple[list[int], list[int], list[int]]] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **kwargs: object) -> list[float]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        for prompt, completion in zip(prompts, completion_ids, strict=True):
            tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                for _ in completion:
                    likeliest = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                    tokens = torch.cat([tokens, likeliest], dim=1)
            rollouts.append((prompt, completion, tokens[0, -len(completion) :].tolist()))
        # Within a group alternately good and bad, so that there is an advantage to learn from.
        return [float(i % 2) for i in range(len(prompts))]

    tokenizer = make_chat_tokenizer()
    arguments = GRPOConfig(
        tmp_path,
        **{**COMMON, "gradient_checkpointing": checkpointing, **rollout},
        max_steps=3,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        learning_rate=1e-2,
        beta=0.1,
        generation_kwargs={"do_sample": False},
    )
    torch.manual_seed(1)
    trainer = GRPOTrainer(
        make_base("qwen3", torch.float32),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": question} for question, _ in PAIRS]),
        processing_class=tokenizer,
        peft_config=make_config(),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert len(rollouts) == 3 * 4
    assert all(found == expected for _, found, expected in rollouts)
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt, _, _ in rollouts}) > 1
    trained = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert trained == {name for name in before if "lora_" in name}
    # Adapters that are switched off are the reference: what was trained differs from it.
    assert [entry["kl"] > 0 for entry in trainer.state.log_history if "kl" in entry] == [True] * 3


@pytest.mark.parametrize("way", ["optimizers", "class", "attribute"])
def test_parameter_groups_are_the_optimizers(way: str, tmp_path: Path) -> None:
    """Of a model that has its adapter already, or once the trainer has added it."""
    arguments = SFTConfig(tmp_path, **COMMON, max_steps=1, per_device_train_batch_size=2, lr_scheduler_type="constant")
    data = {"train_dataset": Dataset.from_list(DATA["text"][0]), "processing_class": make_chat_tokenizer()}
    if way == "attribute":
        trainer = SFTTrainer(make_base("llama", torch.float32), arguments, **data, peft_config=make_config())
        groups = talan_param_groups(trainer.model, 1e-3, side_path_lr_scale=5.0)
        trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": groups})
    else:
        model = make_model("llama", dtype=torch.float32)
        groups = talan_param_groups(model, 1e-3, side_path_lr_scale=5.0)
        given = (
            {"optimizers": (torch.optim.AdamW(groups), None)}
            if way == "optimizers"
            else {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups})}
        )
        trainer = SFTTrainer(model, arguments, **data, **given)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    trainer.train()
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name in names.values() if "lora_" in name}
    assert all(rate == (5e-3 if ".talan." in name else 1e-3) for name, rate in rates.items())


@pytest.mark.parametrize("own_groups", [False, True])
def test_resumed_training_is_the_uninterrupted_one(own_groups: bool, tmp_path: Path) -> None:
    def trainer(folder: Path) -> SFTTrainer:
        arguments = SFTConfig(
            folder,
            **{**COMMON, "save_strategy": "steps"},
            save_steps=2,
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            packing=True,
            max_length=24,
        )
        torch.manual_seed(1)
        made = SFTTrainer(
            make_base("qwen3", torch.float32),
            arguments,
            train_dataset=Dataset.from_list(DATA["text"][0]),
            processing_class=make_chat_tokenizer(),
            peft_config=make_config(talan_dropout=0.2, lora_dropout=0.1),
        )
        if own_groups:
            groups = talan_param_groups(made.model, 1e-2, side_path_lr_scale=3.0, weight_decay=0.1)
            made.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": groups})
        return made

    whole = trainer(tmp_path)
    whole.train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_equal_weights(resumed.model, whole.model)
