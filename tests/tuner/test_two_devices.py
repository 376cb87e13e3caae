"""A model whose later blocks are on another device, by accelerate's hooks; `meta` plays that device."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, get_peft_model

from ..small_models import VOCABULARY, make_base, make_config, make_lora_config, make_tokens


def dispatched() -> torch.nn.Module:
    """The first two blocks stay on the CPU; what comes after them is on `meta`, where shapes are computed."""
    base = make_base("qwen3", torch.float32)
    for module in (*base.model.layers[2:], base.model.norm, base.lm_head):
        module.to("meta")
        add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device("meta"), io_same_device=False))
    return base


def adapted(**options: object) -> PeftModel:
    return get_peft_model(dispatched(), make_config(talan_layers=[1, 2, -1], **options)).eval()


def left_padded() -> dict[str, torch.Tensor]:
    tokens = make_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("position", ["input", "output"])
@pytest.mark.parametrize("mixer", ["attention", "linear", "mlp", "delta"])
def test_side_paths_run_where_their_block_runs(mixer: str, position: str) -> None:
    batch = left_padded()
    lora = get_peft_model(dispatched(), make_lora_config()).eval()
    model = adapted(talan_mixer=mixer, talan_position=position)
    packed = {"input_ids": batch["input_ids"], "position_ids": torch.arange(21).remainder(8).expand(2, -1)}
    with torch.no_grad():
        for given in ({"input_ids": batch["input_ids"]}, batch, packed):
            for use_cache in (False, True):
                logits = model(**given, use_cache=use_cache).logits
                assert logits.is_meta
                assert logits.shape == lora(**given, use_cache=use_cache).logits.shape == (2, 21, VOCABULARY)


def test_memories_stay_on_their_side_paths_device() -> None:
    model, batch = adapted(), left_padded()
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        for _ in range(2):
            assert model(make_tokens(2, 1), attention_mask=mask, past_key_values=cache).logits.is_meta
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)


def test_rows_of_different_adapters() -> None:
    model = adapted(talan_position="input")
    model.add_adapter("other", make_config(talan_layers=[-1]))
    with torch.no_grad():
        assert model(**left_padded(), adapter_names=["default", "other"]).logits.is_meta


def test_nothing_is_copied_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(make_base("qwen3", torch.float32), make_config()).eval()
    moves = []
    original = torch.Tensor.to

    def counted(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        moved = original(self, *args, **kwargs)
        if moved is not self and moved.dtype is self.dtype:
            moves.append(tuple(self.shape))
        return moved

    monkeypatch.setattr(torch.Tensor, "to", counted)
    with torch.no_grad():
        model(**left_padded())
    assert moves == []
