"""docs/reference/errors.md: what the page says of a message is what brings it about, on small models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    ContinuousBatchingConfig,
    Qwen3Config,
    RwkvConfig,
    RwkvForCausalLM,
    SqueezeBertConfig,
    SqueezeBertModel,
)

from peft_talan import (
    TalanConfig,
    export_lora,
    set_talan_strength,
    set_trainable,
    talan_param_groups,
    warm_start,
)
from peft_talan.checkpoint.card import write_card

from ..small_models import DEPTH, make_base, make_config, make_lora_config, make_model, make_several, make_tokens

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
WEIGHTS = "adapter_model.safetensors"
Provocation = Callable[[Path], object]


class Block(nn.Module):
    """A block of a model that is not one of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.proj(hidden_states)


class OwnModel(nn.Module):
    """A model that is not one of transformers'."""

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.stack = nn.ModuleList(block() for _ in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embed(input_ids)
        for block in self.stack:
            hidden_states = block(hidden_states)
        return hidden_states


class TwoStreams(Block):
    """A block that takes two hidden states of each token, as reversible ones do."""

    def forward(self, first: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return first, super().forward(hidden_states)


def own_config(**options: object) -> TalanConfig:
    return TalanConfig(**{"r": 4, "target_modules": ["proj"], "talan_blocks": "stack", **options})


def own_model(block: Callable[[], nn.Module] = Block, **options: object) -> PeftModel:
    return get_peft_model(OwnModel(block), own_config(talan_hidden_size=16, **options))


def saved(folder: Path) -> Path:
    make_model("qwen3", dtype=torch.float32).save_pretrained(folder)
    return folder


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(saved(folder) / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def changed_config(folder: Path, **fields: object) -> Path:
    file = saved(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def load(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(make_base("qwen3", torch.float32), folder)


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = torch.nan


def cut_off(folder: Path) -> Path:
    file = saved(folder) / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def of_another_model(folder: Path) -> PeftModel:
    config = Qwen3Config(**{**make_base("qwen3").config.to_dict(), "intermediate_size": 64})
    return PeftModel.from_pretrained(type(make_base("qwen3"))(config), saved(folder))


def saved_lora(folder: Path, **options: object) -> Path:
    get_peft_model(make_base("qwen3"), make_lora_config(**options)).save_pretrained(folder)
    return folder


@torch.no_grad()
def rows_taken_by_hand(_: Path) -> object:
    model = make_model("qwen3")
    cache = model(make_tokens(), use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    return model(make_tokens(batch=1), past_key_values=cache)


def turned_off() -> object:
    model = make_model("qwen3")
    with model.disable_adapter(), torch.no_grad():
        cache = model(make_tokens(), use_cache=True).past_key_values
    return model(make_tokens(), past_key_values=cache)


@torch.no_grad()
def later_mask(_: Path) -> object:
    model = make_model("qwen3")
    cache = model(make_tokens(), use_cache=True).past_key_values
    mask = torch.ones(2, 22)
    mask[0, 5:9] = 0
    return model(make_tokens(tokens=1), attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def cropped_too_far(_: Path) -> object:
    model = make_model("qwen3")
    cache = model(make_tokens(), use_cache=True).past_key_values
    return cache.crop(-22)


def masked(allowed: torch.Tensor) -> object:
    return make_model("qwen3")(make_tokens(), attention_mask=allowed.expand(2, 1, 21, 21), use_cache=False)


def block_mask(_: Path) -> object:
    mask = create_block_mask(lambda batch, head, query, key: query >= key, 2, None, 21, 21, device="cpu")
    # A dictionary is passed on as it is, and read before the attention, which would have to be flex attention.
    model = make_model("qwen3", make_config(talan_layers=[0], talan_position="input"))
    return model(make_tokens(), attention_mask={"full_attention": mask})


def pages(**options: object) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(page_size=16, num_blocks=4, max_batch_tokens=32, **options)


def with_a_state_of_its_own(_: Path) -> object:
    config = RwkvConfig(vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    model = get_peft_model(RwkvForCausalLM(config), TalanConfig(target_modules=["key"], init_talan_weights=False))
    state = model(make_tokens(), use_cache=True).state
    return model(make_tokens(), state=state, use_cache=True)


def sparse() -> torch.Tensor:
    allowed = torch.ones(21, 21, dtype=torch.bool).tril()
    allowed[10, 3:6] = False
    return allowed


def two_adapters() -> PeftModel:
    return make_several({"one": {}, "other": {}})


def named_like_a_module(folder: Path) -> object:
    model = make_several({"one": {}, "self_attn": {}})
    return model.save_pretrained(folder, selected_adapters=["one"])


def bidirectional() -> PeftModel:
    return make_model("qwen3", make_config(talan_memory_scope="bidirectional", task_type=None))


def no_low_rank() -> PeftModel:
    return make_model("qwen3", make_config(r=0))


PROVOCATIONS: dict[str, Provocation] = {
    "the checkpoint of adapter … has NaN or infinite values in …": lambda f: load(changed_weights(f, with_nan)),
    "the checkpoint of adapter … does not have the side path of its configuration, which has … …; load it with the "
    "base model and the adapter_config.json that it was saved with": lambda f: load(
        changed_config(f, talan_layers=[0, 1])
    ),
    "the checkpoint in … can't be read (…: …); it is incomplete or damaged: fetch or save it again": lambda f: load(
        cut_off(f)
    ),
    "the adapter was made by a newer major version of peft_talan than the installed …;": lambda f: load(
        changed_config(f, talan_version="99.0.0")
    ),
    "the checkpoint of adapter … has a size mismatch for …: shape …, where the model has …; load it with the base "
    "model and the adapter_config.json that it was saved with": of_another_model,
    "folder=…: expected a saved TALAN adapter, but … names none": lambda f: write_card(saved_lora(f)),
    "lora=…: tensors are missing or have no place in …": lambda f: warm_start(
        make_base("qwen3", blocks=DEPTH - 1), str(saved_lora(f))
    ),
    "expected an adapter of type LORA, got one of type …": lambda f: warm_start(make_base("qwen3"), str(saved(f))),
    "choose one of …": lambda _: make_config(talan_mixer="mean"),
    "can't be saved in a JSON file (…); give plain values": lambda _: make_config(talan_cap=0.1, revision=object()),
    "give block indices like [10, -1], fractions of the depth like [0.33, 0.66], 'all', or None for the default": (
        lambda _: make_config(talan_layers=[1, 0.5])
    ),
    "talan_layers=…: index … is out of range for a model of … blocks; use indices from … to …": lambda _: make_model(
        "qwen3", make_config(talan_layers=[DEPTH])
    ),
    "talan_layers=…: a block is named twice in a model of … blocks; name it once": lambda _: make_model(
        "qwen3", make_config(talan_layers=[DEPTH - 1, -1])
    ),
    "does not work with TALAN: …": lambda _: make_config(layer_replication=[[0, 2]]),
    "task_type=… generates, and a token must not see later ones; use 'causal'": lambda _: make_config(
        talan_memory_scope="bidirectional"
    ),
    "there is no low-rank half (r=0 or no target modules); use 'joint' or 'side_path'": lambda _: make_config(
        r=0, talan_trainable="low_rank"
    ),
    "talan_dim=…, talan_slots=…: the side path would hold … numbers, more than the model and than …;": (
        lambda _: make_model("qwen3", make_config(talan_dim=10**6))
    ),
    "adapter_name=…: choose a name that is not empty, has no dot, and is neither '__base__' nor the name of an "
    "attribute of nn.ModuleDict": lambda _: make_several({"a.b": {}}),
    "adapter_name=…: the model already has an adapter of this name; give another name, or call unload() or "
    "delete_adapter() first": lambda _: get_peft_model(make_model("qwen3").base_model.model, make_config()),
    "talan_blocks=None: … list of decoder blocks was found in …": lambda _: own_model(talan_blocks=None),
    "talan_blocks=…: the model has no nn.ModuleList of this name; it has …": lambda _: own_model(talan_blocks="other"),
    "talan_hidden_size=None: the configuration of … does not give the width of the residual stream; set "
    "talan_hidden_size to it": lambda _: get_peft_model(OwnModel(), own_config()),
    "talan_hidden_size=…: the residual stream of … is … wide; leave the field at None": lambda _: make_model(
        "qwen3", make_config(talan_hidden_size=16)
    ),
    "talan_blocks: block ….… is a …, which would call the side path as one of its steps; put it inside a module of its "
    "own class": lambda _: own_model(lambda: nn.Sequential(Block()), target_modules="all-linear"),
    "talan_blocks: … calls modules by .forward(), which runs no hooks, so a side path on its blocks … would do "
    "nothing; use a plain LoraConfig, or call the blocks themselves": lambda _: get_peft_model(
        SqueezeBertModel(
            SqueezeBertConfig(
                vocab_size=64, hidden_size=16, embedding_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=16, q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1,
                intermediate_groups=1, output_groups=1,
            )
        ),
        TalanConfig(target_modules=["query"]),
    ),
    "the cache holds tokens that did not all pass through adapter …": lambda _: turned_off(),
    "the batch has … rows, but the latent memory of adapter … in this cache has …": rows_taken_by_hand,
    "tokens=…: this latent memory … can't be cropped by that number; start again from an empty cache": cropped_too_far,
    "attention_mask: it masks earlier tokens that are in the latent memory of this cache, or unmasks some that are "
    "not;": later_mask,
    "attention_mask=… (…): the side path can't read from it which tokens are padding;": block_mask,
    "attention_mask: a token sees earlier tokens, but not all of those between them and itself": lambda _: masked(
        sparse()
    ),
    "attention_mask: no token sees itself in it": lambda _: masked(~torch.ones(21, 21, dtype=torch.bool).tril()),
    "…: it is not a transformers Cache, so the side path can't carry its memory from call to call with it;": (
        with_a_state_of_its_own
    ),
    "cpu_offload_space=…: the latent memory of a TALAN side path does not follow pages that are moved to the CPU;": (
        lambda _: make_model("qwen3").generate_batch(
            make_tokens().tolist(), continuous_batching_config=pages(cpu_offload_space=1.0)
        )
    ),
    "adapter_names=[...] names the adapter of each row, and continuous batching has no rows;": (
        lambda _: two_adapters().generate_batch(make_tokens().tolist(), adapter_names=["one", "other"])
    ),
    "talan_memory_scope=… of adapter … can't generate:": lambda _: bidirectional().generate_batch(
        make_tokens().tolist(), continuous_batching_config=pages()
    ),
    "…, which do not show whether their rows or their tokens come first in this model, which is none of transformers';": (
        lambda _: own_model()(torch.zeros(5, 5, dtype=torch.long))
    ),
    "adapter_names=…: … names for … rows; give one a row": lambda _: make_several(
        {"one": {"r": 0}, "other": {"r": 0}}
    )(make_tokens(), adapter_names=["one"]),
    "side_path=…: choose 'keep' or 'drop'": lambda _: make_model("qwen3").merge_and_unload(side_path="half"),
    "adapter … would be saved without …: another adapter has the name … of a module;": named_like_a_module,
    "path_initial_model_for_weight_conversion=…: the conversion gives a plain LoRA adapter and would lose the side "
    "path; save without it": lambda f: make_model("qwen3").save_pretrained(
        f, path_initial_model_for_weight_conversion=str(f)
    ),
    "adapter_name=…: the adapter has no low-rank half (r=0 or no target modules)": lambda f: export_lora(
        no_low_rank(), f
    ),
    "adapters=…: … and … both have a side path at block …, and the sum of two side paths is none;": (
        lambda _: two_adapters().add_weighted_adapter(["one", "other"], [0.5, 0.5], "sum")
    ),
    "strength=…: give a finite number; 1 is as trained, 0 the low-rank half alone": lambda _: set_talan_strength(
        make_model("qwen3"), float("nan")
    ),
    "layers=…: give a list of blocks that have this side path: …": lambda _: set_talan_strength(
        make_model("qwen3"), 0.5, adapter_name="default", layers=[0]
    ),
    "model: no parameter requires a gradient; load the adapter with is_trainable=True": lambda f: talan_param_groups(
        load(saved(f)), lr=1e-3
    ),
    "scope=…: adapter … has no low-rank half; use 'joint' or 'side_path'": lambda _: set_trainable(
        no_low_rank(), "low_rank"
    ),
}


def headings() -> list[str]:
    return re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", PROVOCATIONS)
@pytest.mark.filterwarnings("ignore")
def test_the_message_comes_where_the_page_says(message: str, tmp_path: Path) -> None:
    assert message in headings()
    pattern = re.escape(message).replace("…", ".*")
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.compile(pattern, re.DOTALL)):
        PROVOCATIONS[message](tmp_path)
