"""Invariants 1 and 7: what the adapter leaves as it is; and what PEFT's switches do to LoRA weights and side path."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import DynamicCache

import peft_talan
from peft_talan import TalanLayer

from ..own_model import Block, OwnModel, adapt
from ..small_models import (
    ARCHITECTURES,
    last_state,
    logits,
    make_base,
    make_config,
    make_lora_config,
    make_model,
    make_tokens,
    rounding,
)

MATCHED_HALVES = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def structure(model: nn.Module) -> list[tuple[str, type, int, int, list[str]]]:
    return [
        (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize(
    ("half", "position"), [*((half, "output") for half in MATCHED_HALVES), (next(iter(MATCHED_HALVES)), "input")]
)
def test_fresh_adapter_is_its_matched_low_rank_adapter(architecture: str, half: str, position: str) -> None:
    options = {**MATCHED_HALVES[half], "init_lora_weights": True}
    if half == "dora" and architecture in ("mixtral", "qwen3_moe"):
        options["target_modules"] = ["q_proj", "v_proj"]  # PEFT has no DoRA for fused experts
    talan = make_model(
        architecture, make_config(**options, talan_position=position, init_talan_weights=True), torch.float32
    )
    lora = make_model(architecture, make_lora_config(**options), torch.float32)
    with torch.no_grad():
        for model in (talan, lora):
            generator = torch.Generator().manual_seed(3)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=generator)
    assert not torch.equal(logits(lora), logits(lora.get_base_model().eval()).zero_())
    assert torch.equal(logits(talan), logits(lora))


@pytest.mark.parametrize("writeback", ["add", "gated", "capped", "orthogonal", "relative"])
@pytest.mark.parametrize("mixer", ["attention", "linear", "mlp", "delta"])
def test_fresh_side_path_of_any_kind_changes_nothing(mixer: str, writeback: str) -> None:
    config = make_config(talan_mixer=mixer, talan_writeback=writeback, init_talan_weights=True, init_lora_weights=True)
    assert torch.equal(logits(make_model("qwen3", config)), logits(make_base("qwen3")))


@pytest.mark.parametrize("position", ["input", "output"])
def test_disabled_is_the_base_model(architecture: str, position: str) -> None:
    expected = logits(make_base(architecture, torch.float32))
    model = make_model(architecture, make_config(talan_position=position), torch.float32)
    assert not torch.allclose(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected)


@pytest.mark.parametrize("position", ["input", "output"])
def test_unloaded_is_the_base_model_without_a_trace(architecture: str, position: str) -> None:
    untouched = make_base(architecture, torch.float32)
    unloaded = make_model(architecture, make_config(talan_position=position), torch.float32).unload()
    assert structure(unloaded) == structure(untouched)
    assert torch.equal(logits(unloaded), logits(untouched))
    assert list(unloaded.state_dict()) == list(untouched.state_dict())


def test_names_and_classes_of_the_base_model_stay(architecture: str) -> None:
    talan = make_model(architecture).base_model.model
    lora = make_model(architecture, make_lora_config()).base_model.model
    side_path = {name for name, _ in talan.named_parameters() if ".talan." in name}
    assert side_path
    assert [name for name, _ in talan.named_parameters() if name not in side_path] == [
        name for name, _ in lora.named_parameters()
    ]
    modules = {name: type(m) for name, m in talan.named_modules() if ".talan" not in name}
    assert modules == {name: type(m) for name, m in lora.named_modules()}


def test_low_rank_keys_of_the_checkpoint_are_those_of_lora(architecture: str) -> None:
    talan = get_peft_model_state_dict(make_model(architecture))
    lora = get_peft_model_state_dict(make_model(architecture, make_lora_config()))
    side_path = {key for key in talan if ".talan." in key}
    assert len(side_path) == 6, "read, slot bias and write at each of two blocks"
    assert set(talan) - side_path == set(lora)


def test_side_path_alone() -> None:
    for options in ({"r": 0}, {"target_modules": []}):
        model = make_model("qwen3", make_config(**options))
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trainable and all(".talan." in name for name in trainable)
        assert not torch.allclose(logits(model), logits(make_base("qwen3")))


@pytest.mark.parametrize("position", ["input", "output"])
def test_hidden_states_show_what_the_next_block_receives(architecture: str, position: str) -> None:
    model = make_model(architecture, make_config(talan_position=position))
    blocks = [m for m in model.modules() if isinstance(getattr(m, "talan", None), TalanLayer)]
    received: dict[int, torch.Tensor] = {}
    handles = [
        following.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: received.__setitem__(
                index, (args[0] if args else kwargs["hidden_states"]).clone()
            ),
            with_kwargs=True,
        )
        for index, following in enumerate(_all_blocks(model))
    ]
    with torch.no_grad():
        shown = model(make_tokens(), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert len(blocks) == 2 and len(received) == len(shown) - 1
    for index, states in received.items():
        assert torch.equal(shown[index], states), f"block {index}"


def _all_blocks(model: PeftModel) -> list[nn.Module]:
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


def test_plain_module_with_named_blocks_and_width() -> None:
    torch.manual_seed(0)
    base = OwnModel(Block)
    tokens = make_tokens()
    expected = base(tokens)
    model = adapt(base, talan_layers=[1], init_talan_weights=False)
    assert not torch.allclose(model(tokens), expected)
    assert torch.equal(model.unload()(tokens), expected)


def test_a_container_that_calls_its_children_is_refused_as_a_block() -> None:
    base = OwnModel(Block)
    base.stack[1] = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"stack\.1.*Sequential"):
        adapt(base, talan_layers=[1])


@pytest.mark.parametrize("architecture_", ["qwen3", "gpt2"])
def test_several_adapters_switch_and_leave(architecture_: str) -> None:
    model = make_model(architecture_)
    first = logits(model)
    torch.manual_seed(4)
    model.add_adapter("other", make_config(talan_layers=[0, 1], talan_mixer="linear", talan_slots=7, r=2))
    model.to(torch.float64)
    assert torch.equal(logits(model), first), "a new adapter is not active before it is set"
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert not [name for name in model.state_dict() if ".other" in name]


def test_two_active_adapters_add_their_perturbations() -> None:
    model = make_model("qwen3", make_config(r=0, talan_layers=[-1]))
    torch.manual_seed(4)
    model.add_adapter("other", make_config(r=0, talan_layers=[-1], talan_mixer="linear"))
    model.to(torch.float64)

    with model.disable_adapter():
        base = last_state(model)
    changes = []
    for name in ("default", "other"):
        model.set_adapter(name)
        changes.append(last_state(model) - base)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(last_state(model) - base, changes[0] + changes[1], **rounding())


def mixed_model(**options: object) -> PeftModel:
    model = make_model("qwen3", make_config(**options))
    torch.manual_seed(4)
    model.add_adapter("other", make_config(talan_layers=[0, 1], talan_mixer="linear", talan_position="input"))
    return model.to(torch.float64)


ROWS = ["default", "__base__", "other", "default"]


def test_a_batch_of_mixed_adapters_is_its_rows_one_by_one() -> None:
    model = mixed_model()
    tokens = make_tokens(batch=len(ROWS))
    generated = model.generate(input_ids=tokens, adapter_names=ROWS, max_new_tokens=6, do_sample=False)
    beams = model.generate(input_ids=tokens, adapter_names=ROWS, max_new_tokens=6, do_sample=False, num_beams=3)
    with torch.no_grad():
        mixed = model(tokens, adapter_names=ROWS).logits
    for index, name in enumerate(ROWS):
        row = tokens[index : index + 1]
        with model.disable_adapter() if name == "__base__" else nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            with torch.no_grad():
                torch.testing.assert_close(mixed[index : index + 1], model(row).logits, **rounding())
            alone = model.generate(input_ids=row, max_new_tokens=6, do_sample=False)
            assert torch.equal(generated[index : index + 1], alone)
            alone = model.generate(input_ids=row, max_new_tokens=6, do_sample=False, num_beams=3)
            assert torch.equal(beams[index : index + 1], alone)


@torch.no_grad()
def test_rows_that_change_their_adapter_on_one_cache_are_refused() -> None:
    model = mixed_model()
    tokens = make_tokens(batch=2)
    for first, second in ((["default", "other"], ["default", "default"]), (["other", "default"], None)):
        cache = DynamicCache(config=model.get_base_model().config)
        model(tokens, adapter_names=first, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="empty cache"):
            model(tokens[:, :1], adapter_names=second, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="non-existing"):
        model(tokens, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="names"):
        model(tokens, adapter_names=["default"])


def test_strength_zero_is_the_low_rank_half_alone() -> None:
    model = make_model("qwen3", make_config(talan_alpha=0.0, init_lora_weights=True))
    torch.testing.assert_close(logits(model), logits(make_base("qwen3")), **rounding())


def test_copies_are_independent() -> None:
    model = make_model("qwen3")
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".talan." in name:
                parameter.add_(1.0)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(twin), expected)
    assert structure(twin.unload()) == structure(make_base("qwen3"))


def test_status_reports_see_both_halves() -> None:
    model = make_model("qwen3")
    layers = [layer for layer in model.get_layer_status() if layer.module_type == "TalanLayer"]
    assert [layer.available_adapters for layer in layers] == [["default"], ["default"]]
    assert model.get_model_status().enabled is True


def test_a_failed_call_leaves_the_model_as_it_was(subtests: pytest.Subtests) -> None:
    failing = {
        "talan_layers": {"talan_layers": [99]},
        "talan_blocks": {"talan_blocks": "nowhere"},
        "talan_hidden_size": {"talan_hidden_size": 31},
        "target_modules": {"target_modules": ["nowhere"]},
    }
    for field, options in failing.items():
        with subtests.test(field):
            base = make_base("qwen3")
            before = structure(base)
            with pytest.raises(ValueError, match=field if field != "target_modules" else "Target modules"):
                get_peft_model(base, make_config(**options))
            assert structure(base) == before


def test_registration_is_idempotent() -> None:
    peft_talan.register_talan()
    peft_talan.register_talan()
    assert ARCHITECTURES
