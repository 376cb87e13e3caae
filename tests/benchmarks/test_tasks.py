"""The task types of PEFT on decoders, encoders and encoder-decoders: heads train and come back, memories suit them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from ..small_models import CONFIGS, DEPTH, VOCABULARY, make_config, make_lora_config, make_tokens, rounding

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": None}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
OTHER_CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(vocab_size=VOCABULARY, num_hidden_layers=DEPTH, **_SIZES),
    "t5": T5Config(**_TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=DEPTH, num_heads=4),
    "bart": BartConfig(
        **_TOKENS,
        d_model=32,
        encoder_layers=DEPTH,
        decoder_layers=DEPTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        bos_token_id=None,
        forced_eos_token_id=None,
    ),
}
TARGETS = {"bert": ["query", "value"], "t5": ["q", "v", "wo"]}
SEQ_2_SEQ = ("t5", "bart")


def labels_of(task: str) -> dict[str, torch.Tensor]:
    tokens = make_tokens()
    return {
        "SEQ_CLS": {"labels": tokens[:, 0] % 3},
        "TOKEN_CLS": {"labels": tokens % 3},
        "QUESTION_ANS": {"start_positions": tokens[:, 0] % 5, "end_positions": tokens[:, 1] % 5 + 5},
        "SEQ_2_SEQ_LM": {"labels": make_tokens(seed=7, tokens=9)},
        "FEATURE_EXTRACTION": {},
    }[task]


AUTO_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}
CASES = [
    *((task, name) for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") for name in ("qwen3", "llama", "bert")),
    *(("SEQ_2_SEQ_LM", name) for name in SEQ_2_SEQ),
    *(("FEATURE_EXTRACTION", name) for name in ("bert", "qwen3")),
]


def build(task: str, architecture: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    config = copy.deepcopy({**CONFIGS, **OTHER_CONFIGS}[architecture])
    config.num_labels = 2 if task == "QUESTION_ANS" else 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AUTO_CLASSES[task].from_config(config).to(dtype).eval()


def adapt(task: str, architecture: str, config: LoraConfig, dtype: torch.dtype = torch.float64) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(build(task, architecture, dtype), config).to(dtype).eval()


def options_of(task: str, architecture: str) -> dict[str, object]:
    return {"task_type": task, "target_modules": TARGETS.get(architecture, ["q_proj", "v_proj"])}


def outputs(model: torch.nn.Module, task: str) -> list[torch.Tensor]:
    inputs = {"input_ids": make_tokens(), **labels_of(task)}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs.pop("labels")
    with torch.no_grad():
        return [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("task", "architecture"), CASES)
def test_both_halves_and_the_head_train_and_come_back(task: str, architecture: str, tmp_path: Path) -> None:
    options = options_of(task, architecture)
    scope = "bidirectional" if architecture == "bert" else "causal"
    talan = make_config(
        **options, talan_memory_scope=scope, talan_layers=[0, 1], init_lora_weights=True, init_talan_weights=True
    )
    model = adapt(task, architecture, talan, torch.float32)
    lora = adapt(task, architecture, make_lora_config(**options), torch.float32)
    base = build(task, architecture, torch.float32)
    assert model.peft_config["default"].task_type == TaskType(task)
    assert type(model) is type(lora)
    with model.disable_adapter():
        assert equal(outputs(model, task), outputs(base, task))

    def trainable(model: PeftModel) -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad and ".talan." not in name}

    assert trainable(model) == trainable(lora)
    heads = [name for name in trainable(model) if "modules_to_save" in name]
    assert bool(heads) == (task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the write-back and B begin at zero, so the rest has a gradient at the second step
        optimizer.zero_grad()
        output = model(input_ids=make_tokens(), **labels_of(task))
        loss = output.last_hidden_state[..., 0].sum() if task == "FEATURE_EXTRACTION" else output.loss
        loss.backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(task, architecture, torch.float32), tmp_path)
    assert type(loaded) is type(model)
    assert equal(outputs(loaded, task), outputs(model, task))
    assert not equal(outputs(model, task)[-1:], outputs(base, task)[-1:])


@torch.no_grad()
@pytest.mark.parametrize("architecture", SEQ_2_SEQ)
@pytest.mark.parametrize("position", ["input", "output"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_an_encoder_decoder_equals_the_full_forward(
    architecture: str, position: str, beams: int
) -> None:
    config = make_config(**options_of("SEQ_2_SEQ_LM", architecture), talan_position=position)
    model = adapt("SEQ_2_SEQ_LM", architecture, config)
    source = make_tokens()
    mask = torch.ones_like(source)
    mask[0, :7] = 0
    generated = model.generate(
        input_ids=source,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        num_beams=beams,
        return_dict_in_generate=True,
        output_logits=True,
    )
    full = model(input_ids=source, attention_mask=mask, decoder_input_ids=generated.sequences[:, :-1]).logits
    if beams == 1:
        # generate() keeps logits in float32.
        torch.testing.assert_close(torch.stack(generated.logits, dim=1), full.float(), **rounding(torch.float32))
    expected = model.generate(
        input_ids=source, attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=beams, use_cache=False
    )
    assert torch.equal(generated.sequences, expected)
    with model.disable_adapter():
        base = model(input_ids=source, attention_mask=mask, decoder_input_ids=generated.sequences[:, :-1]).logits
    assert not torch.allclose(full, base)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [None, "encoder.block"])
@pytest.mark.parametrize("beams", [1, 3])
def test_mixed_batches_of_an_encoder_decoder(blocks: str | None, beams: int) -> None:
    options = {**options_of("SEQ_2_SEQ_LM", "t5"), "talan_blocks": blocks}
    model = adapt("SEQ_2_SEQ_LM", "t5", make_config(**options))
    model.add_adapter("other", make_config(**options, talan_layers=[0], talan_mixer="linear"))
    model.to(torch.float64)
    rows = ["other", "default", "__base__"]
    source = make_tokens(batch=len(rows))
    greedy = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=source, adapter_names=rows, **greedy)
    for index, name in enumerate(rows[:2]):
        model.set_adapter(name)
        alone = model.generate(input_ids=source[index : index + 1], **greedy)
        assert torch.equal(mixed[index : index + 1], alone)
    with model.disable_adapter():
        assert torch.equal(mixed[2:], model.generate(input_ids=source[2:], **greedy))
