"""docs/reference/limits.md: what a row says does not work is refused, and what it says to do instead works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from peft_talan import warm_start

from ..own_model import Block, own_model
from ..small_models import (
    last_state,
    logits,
    make_base,
    make_config,
    make_lora_config,
    make_model,
    make_several,
    make_tokens,
    rounding,
)

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "limits.md"
Trial = Callable[[Path], None]


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(make_base("qwen3"), folder, autocast_adapter_dtype=False).eval()


def two_side_paths_at_one_block(_: Path) -> None:
    model = make_several({"a": {"r": 0, "talan_layers": [-1]}, "b": {"r": 0, "talan_layers": [-1]}})
    with pytest.raises(ValueError, match="the sum of two side paths is none"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    states = []
    for active in (["a"], ["b"], ["a", "b"]):
        model.base_model.set_adapter(active)
        states.append(last_state(model))
    with model.disable_adapter():
        base = last_state(model)
    torch.testing.assert_close(states[2] - base, states[0] - base + states[1] - base, **rounding())


def talan_beside_lora(folder: Path) -> None:
    lora = get_peft_model(make_base("qwen3"), make_lora_config(init_lora_weights=False))
    lora.save_pretrained(folder / "lora")
    refused = pytest.raises(ValueError, match="Cannot combine adapters with different peft types")
    with refused:
        lora.add_adapter("talan", make_config())
    model = make_model("qwen3")
    with refused:
        model.load_adapter(folder / "lora", "lora")
    warm_start(make_base("qwen3"), str(folder / "lora")).save_pretrained(folder / "as-talan")
    model = make_model("qwen3")
    model.load_adapter(folder / "as-talan", "from-lora", autocast_adapter_dtype=False)
    model.set_adapter("from-lora")
    assert torch.equal(logits(model), logits(loaded(folder / "lora")))


def mixed_model(_: Path) -> None:
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        PeftMixedModel(make_base("qwen3"), make_config())
    assert set(make_several({"a": {}, "b": {}}).peft_config) == {"a", "b"}


def hotswap(folder: Path) -> None:
    model = make_model("qwen3")
    expected = logits(model)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="only supports LORA"):
        hotswap_adapter(model, folder, "default")
    base = make_base("qwen3")
    base.load_adapter(folder)
    with pytest.raises(ValueError, match="only supported for LoRA"):
        base.load_adapter(folder, adapter_name="default", hotswap=True)
    model.load_adapter(folder, "other", autocast_adapter_dtype=False)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model), expected)


def refused_options(_: Path) -> None:
    options = {
        "layer_replication": [[0, 2], [1, 4]],
        "alora_invocation_tokens": [1],
        "arrow_config": ArrowConfig(),
        "megatron_config": {"key": 1},
    }
    for option, value in options.items():
        with pytest.raises(ValueError, match=f"{option}=.*does not work with TALAN"):
            make_config(**{option: value})


@torch.no_grad()
def foreign_cache(_: Path) -> None:
    model = make_several({"a": {}, "b": {}})
    with model.disable_adapter():
        without = model(make_tokens(), use_cache=True).past_key_values
    of_a = model(make_tokens(), use_cache=True).past_key_values
    for name, cache in (("a", without), ("b", of_a)):
        model.set_adapter(name)
        with pytest.raises(ValueError, match="start from an empty cache"):
            model(make_tokens(), past_key_values=cache)
    model(make_tokens(), past_key_values=DynamicCache(config=model.config))


def bidirectional(_: Path) -> None:
    with pytest.raises(ValueError, match="use 'causal'"):
        make_config(talan_memory_scope="bidirectional")
    model = make_model("qwen3", make_config(task_type=None, talan_memory_scope="bidirectional"))
    with pytest.raises(ValueError, match=r"talan_memory_scope='bidirectional'.*'causal'"):
        model.generate(input_ids=make_tokens(), max_new_tokens=2)


@torch.no_grad()
def crops(_: Path) -> None:
    tokens = make_tokens()
    for model in (make_base("qwen3"), make_model("qwen3")):
        static = StaticCache(config=model.config, max_cache_len=32)
        model(tokens, past_key_values=static, use_cache=True)
        with pytest.raises((AttributeError, ValueError), match=r"crop|can forget the last 0 tokens"):
            static.crop(-3)
    window = make_model("mistral")
    for model in (make_base("mistral"), window):
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache, use_cache=True)
        with pytest.raises((RuntimeError, ValueError), match="activate_past_recording"):
            cache.crop(-3)
    recorded = DynamicCache(config=window.config)
    recorded.activate_past_recording()
    for model, start in ((window, recorded), (make_model("qwen3"), None)):
        cache = model(tokens, past_key_values=start, use_cache=True).past_key_values
        cache.crop(-3)
        again = model(tokens[:, -3:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(again, logits(model)[:, -3:], **rounding())
    greedy = {"input_ids": tokens[:1], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(window.generate(**greedy), window.generate(**greedy, prompt_lookup_num_tokens=2))


def block_mask(_: Path) -> None:
    mask = create_block_mask(lambda batch, head, query, key: query >= key, 2, None, 21, 21, device="cpu")
    model = make_model("qwen3", make_config(talan_layers=[0], talan_position="input"))
    # A dictionary is passed on as it is, and read before the attention, which would have to be flex attention.
    with pytest.raises(TypeError, match="1 for real tokens and 0 for padding"):
        model(make_tokens(), attention_mask={"full_attention": mask})


def no_configuration(_: Path) -> None:
    with pytest.raises(ValueError, match="talan_blocks=None"):
        own_model(talan_blocks=None)
    with pytest.raises(ValueError, match="talan_hidden_size=None"):
        own_model(talan_hidden_size=None)
    model = own_model(init_talan_weights=False)
    changed = model(make_tokens())
    with model.disable_adapter():
        assert not torch.equal(model(make_tokens()), changed)


def sequential_blocks(_: Path) -> None:
    with pytest.raises(ValueError, match="put it inside a module of its own class"):
        own_model(lambda: nn.Sequential(Block()))
    own_model(Block)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def transforms(_: Path) -> None:
    model = make_model("qwen3", attention="eager").requires_grad_(False)
    embeddings = model.get_input_embeddings()(make_tokens(tokens=5))

    def run(embedded: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embedded, use_cache=False).logits.square().mean()

    direction = torch.randn_like(embeddings)
    tolerance = rounding(torch.float32)  # Qwen3's norms compute in float32.
    gradient = torch.func.grad(run)
    _, forward_mode = torch.func.jvp(run, (embeddings,), (direction,))
    torch.testing.assert_close(forward_mode, (gradient(embeddings) * direction).sum(), **tolerance)
    _, second = torch.func.jvp(gradient, (embeddings,), (direction,))
    expected = torch.func.grad(lambda embedded: (gradient(embedded) * direction).sum())(embeddings)
    torch.testing.assert_close(second, expected, **tolerance)
    lengths = {"tokens": {1: torch.export.Dim("tokens")}}
    exported = torch.export.export(Logits(model), (make_tokens(),), dynamic_shapes=lengths, strict=False).module()
    for count in (2, 3, 40):
        tokens = make_tokens(tokens=count)
        torch.testing.assert_close(exported(tokens), Logits(model)(tokens), **rounding())


TRIALS: dict[str, Trial] = {
    "`add_weighted_adapter` can't add two side paths at one block": two_side_paths_at_one_block,
    "TALAN and LoRA adapters can't be in one `PeftModel`": talan_beside_lora,
    "`PeftMixedModel` takes some of PEFT's own types only": mixed_model,
    "Hotswap takes LoRA only": hotswap,
    "`layer_replication`, `alora_invocation_tokens`, `arrow_config`, `megatron_config`": refused_options,
    "A cache that was filled without the side path, or by another adapter": foreign_cache,
    '`talan_memory_scope="bidirectional"` can\'t generate': bidirectional,
    "Static caches can't be cropped, and sliding-window caches only if": crops,
    "A block mask of flex attention that the caller makes": block_mask,
    "A model without a configuration of transformers'": no_configuration,
    "Blocks that are an `nn.Sequential`": sequential_blocks,
    "`torch.func`, forward mode, second derivatives and `torch.export`": transforms,
}
"""How a row of the page begins, and what tries it."""


def test_the_page_names_the_rows_that_are_tried_here() -> None:
    rows = re.findall(r"^\| (.+) \| this page[^|]*\|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len(TRIALS)
    assert all(sum(row.startswith(limit) for row in rows) == 1 for limit in TRIALS)


@pytest.mark.parametrize("limit", TRIALS)
@pytest.mark.filterwarnings("ignore")
def test_the_limit_and_the_way_out(limit: str, tmp_path: Path) -> None:
    TRIALS[limit](tmp_path)
