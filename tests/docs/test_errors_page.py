"""docs/reference/errors.md: what the page says of a message is what brings it about, on small models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    PreTrainedModel,
    Qwen3Config,
    RwkvConfig,
    RwkvForCausalLM,
    SqueezeBertConfig,
    SqueezeBertModel,
)

from peft_talan import TalanConfig, export_lora, set_talan_strength, set_trainable, talan_param_groups, warm_start
from peft_talan.checkpoint.card import write_card

from ..own_model import Block, own_model
from ..small_models import DEPTH, make_base, make_config, make_lora_config, make_model, make_several, make_tokens

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
WEIGHTS = "adapter_model.safetensors"
Provocation = Callable[[Path], object]


def saved(folder: Path) -> str:
    make_model("qwen3", dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def saved_lora(folder: Path) -> str:
    get_peft_model(make_base("qwen3"), make_lora_config()).save_pretrained(folder)
    return str(folder)


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    saved(folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return str(folder)


def changed_config(folder: Path, **fields: object) -> str:
    saved(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return str(folder)


def cut_off(folder: Path) -> str:
    saved(folder)
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    return str(folder)


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = torch.nan


def load(folder: str) -> PeftModel:
    return PeftModel.from_pretrained(make_base("qwen3", torch.float32), folder)


def load_over(folder: str, **options: object) -> object:
    return make_model("qwen3", make_config(**options)).load_adapter(folder, "default")


def of_another_model(folder: Path) -> PeftModel:
    base = make_base("qwen3")
    config = Qwen3Config(**{**base.config.to_dict(), "intermediate_size": 64})
    return PeftModel.from_pretrained(type(base)(config), saved(folder))


def adapted() -> PreTrainedModel:
    return make_model("qwen3").base_model.model


def two_adapters(**options: object) -> PeftModel:
    return make_several({"one": options, "other": options})


def bidirectional() -> PeftModel:
    return make_model("qwen3", make_config(talan_memory_scope="bidirectional", task_type=None))


def no_low_rank() -> PeftModel:
    return make_model("qwen3", make_config(r=0))


def calls_forward(_: Path) -> PeftModel:
    groups = dict.fromkeys(
        ("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups"), 1
    )
    sizes = {"vocab_size": 64, "hidden_size": 16, "embedding_size": 16, "intermediate_size": 16}
    config = SqueezeBertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes, **groups)
    return get_peft_model(SqueezeBertModel(config), TalanConfig(target_modules=["query"]))


@torch.no_grad()
def turned_off(_: Path) -> object:
    model = make_model("qwen3")
    with model.disable_adapter():
        cache = model(make_tokens(), use_cache=True).past_key_values
    return model(make_tokens(), past_key_values=cache)


@torch.no_grad()
def rows_taken_by_hand(_: Path) -> object:
    model = make_model("qwen3")
    cache = model(make_tokens(), use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    return model(make_tokens(batch=1), past_key_values=cache)


@torch.no_grad()
def cropped_too_far(_: Path) -> object:
    cache = make_model("qwen3")(make_tokens(tokens=21), use_cache=True).past_key_values
    return cache.crop(-22)


@torch.no_grad()
def no_later_mask(_: Path) -> object:
    model, mask = make_model("qwen3"), torch.ones(2, 21)
    mask[0, :4] = 0
    cache = model(make_tokens(tokens=21), attention_mask=mask, use_cache=True).past_key_values
    return model(make_tokens(tokens=1), past_key_values=cache)


@torch.no_grad()
def later_mask(_: Path) -> object:
    model = make_model("qwen3")
    cache = model(make_tokens(tokens=21), use_cache=True).past_key_values
    mask = torch.ones(2, 22)
    mask[0, 5:9] = 0
    return model(make_tokens(tokens=1), attention_mask=mask, past_key_values=cache)


def with_a_state_of_its_own(_: Path) -> object:
    config = RwkvConfig(vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    model = get_peft_model(RwkvForCausalLM(config), TalanConfig(target_modules=["key"]))
    return model(make_tokens(), state=model(make_tokens(), use_cache=True).state, use_cache=True)


def block_mask(_: Path) -> object:
    mask = create_block_mask(lambda batch, head, query, key: query >= key, 2, None, 21, 21, device="cpu")
    # A dictionary is passed on as it is, and read before the attention, which would have to be flex attention.
    model = make_model("qwen3", make_config(talan_layers=[0], talan_position="input"))
    return model(make_tokens(), attention_mask={"full_attention": mask})


def sparse() -> torch.Tensor:
    allowed = torch.ones(21, 21, dtype=torch.bool).tril()
    allowed[10, 3:6] = False
    return allowed


def masked(allowed: torch.Tensor) -> object:
    return make_model("qwen3")(make_tokens(), attention_mask=allowed.expand(2, 1, 21, 21), use_cache=False)


def one_name_for_two_rows(_: Path) -> object:
    # PEFT itself counts the names where there are LoRA weights.
    return two_adapters(r=0)(make_tokens(), adapter_names=["one"])


def served(model: PeftModel, **options: object) -> object:
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=4, max_batch_tokens=32, **options)
    return model.generate_batch(make_tokens().tolist(), continuous_batching_config=pages)


def named_like_a_module(folder: Path) -> object:
    return make_several({"one": {}, "self_attn": {}}).save_pretrained(folder, selected_adapters=["one"])


def merged(folder: Path) -> Path:
    make_model("qwen3").merge_and_unload().save_pretrained(folder)
    return folder


def merged_without_a_tensor(folder: Path) -> object:
    tensors = load_file(merged(folder) / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if ".write." not in name}
    save_file(left, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder)


def merged_without_a_field(folder: Path) -> object:
    config = json.loads((merged(folder) / "config.json").read_text())
    del config["talan"][0]["blocks"]
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder)


def converted(folder: Path) -> object:
    return make_model("qwen3").save_pretrained(folder, path_initial_model_for_weight_conversion=str(folder))


PROVOCATIONS: dict[str, Provocation] = {
    # Installation and loading
    "the checkpoint of adapter … has NaN": lambda folder: load(changed_weights(folder, with_nan)),
    "the checkpoint of adapter … does not have": lambda folder: load(changed_config(folder, talan_layers=[0, 1])),
    "the checkpoint in … can't be read": lambda folder: load(cut_off(folder)),
    "the adapter was made by a newer": lambda folder: load(changed_config(folder, talan_version="99.0.0")),
    "the checkpoint of adapter … has a size mismatch": of_another_model,
    "adapter_name=…: PEFT reads only": lambda folder: load_over(saved(folder), talan_alpha=0.5),
    "adapter_name=…: the adapter of this name": lambda folder: load_over(saved_lora(folder)),
    "…=…: it is a merged model": lambda folder: load(str(merged(folder))),
    "folder=…: expected a saved TALAN adapter": lambda folder: write_card(saved_lora(folder)),
    "lora=…: tensors are missing": lambda folder: warm_start(make_base("qwen3", blocks=3), saved_lora(folder)),
    "expected an adapter of type LORA": lambda folder: warm_start(make_base("qwen3"), saved(folder)),
    # Configuration
    "choose one of …": lambda _: make_config(talan_mixer="mean"),
    "give a whole number of at least": lambda _: make_config(talan_slots=0),
    "can't be saved in a JSON file": lambda _: make_config(revision=object()),
    "give block indices like": lambda _: make_config(talan_layers=[1, 0.5]),
    "talan_layers=…: index … is out of range": lambda _: make_model("qwen3", make_config(talan_layers=[DEPTH])),
    "talan_layers=…: the model has … blocks": lambda _: make_model("qwen3", make_config(talan_layers="every_99")),
    "talan_layers=…: a block is named twice": lambda _: make_model("qwen3", make_config(talan_layers=[DEPTH - 1, -1])),
    "does not work with TALAN": lambda _: make_config(layer_replication=[[0, 2]]),
    "task_type=… generates": lambda _: make_config(talan_memory_scope="bidirectional"),
    "talan_mixer='delta' has gates": lambda _: make_config(talan_mixer="delta", talan_soft_cap=7.0),
    "talan_mixer='delta' goes through": lambda _: make_config(
        talan_mixer="delta", task_type=None, talan_memory_scope="bidirectional"
    ),
    "there are no LoRA weights": lambda _: make_config(r=0, talan_trainable="low_rank"),
    "talan_dim=…, talan_slots=…": lambda _: make_model("qwen3", make_config(talan_dim=10**6)),
    "adapter_name=…: choose a name": lambda _: make_several({"a.b": {}}),
    "adapter_name=…: the model already has": lambda _: get_peft_model(adapted(), make_config()),
    # Finding the blocks
    "talan_blocks=None": lambda _: own_model(talan_blocks=None),
    "talan_blocks=…: the model has no nn.ModuleList": lambda _: own_model(talan_blocks="other"),
    "talan_hidden_size=None": lambda _: own_model(talan_hidden_size=None),
    "talan_hidden_size=…": lambda _: make_model("qwen3", make_config(talan_hidden_size=16)),
    "talan_blocks: block ….… is a …": lambda _: own_model(lambda: nn.Sequential(Block())),
    "talan_blocks: … calls modules by .forward()": calls_forward,
    # Generation and caches
    "the cache holds tokens that did not all pass": turned_off,
    "the batch has … rows": rows_taken_by_hand,
    "tokens=…: the latent memory can forget": cropped_too_far,
    "attention_mask: it masks earlier tokens": later_mask,
    "attention_mask=None": no_later_mask,
    "…: it is not a transformers Cache": with_a_state_of_its_own,
    "…, which do not show whether": lambda _: own_model()(torch.zeros(5, 5, dtype=torch.long)),
    "talan_memory_scope=…… can't generate": lambda _: served(bidirectional()),
    "attention_mask=… (…)": block_mask,
    "attention_mask: a token sees earlier tokens": lambda _: masked(sparse()),
    "attention_mask: no token sees itself": lambda _: masked(~torch.ones(21, 21, dtype=torch.bool).tril()),
    "adapter_names=…: … names for … rows": one_name_for_two_rows,
    "cpu_offload_space=…": lambda _: served(make_model("qwen3"), cpu_offload_space=1.0),
    "adapter_names=[...]": lambda _: two_adapters().generate_batch(
        make_tokens().tolist(), adapter_names=["one", "one"]
    ),
    # Saving, merging, exporting
    "side_path=…: choose": lambda _: make_model("qwen3").merge_and_unload(side_path="half"),
    "adapter … would be saved without": named_like_a_module,
    "path_initial_model_for_weight_conversion": converted,
    "adapter_name=…: the adapter has no LoRA weights": lambda folder: export_lora(no_low_rank(), folder),
    "save_directory=…: it holds a model": lambda folder: export_lora(saved(folder / "a"), merged(folder / "b")),
    "save_directory=…: the adapter itself": lambda folder: export_lora(saved(folder), folder),
    "the model's config.json has a side path": merged_without_a_tensor,
    "talan: the side path in config.json lacks": merged_without_a_field,
    "adapters=…: … and … both": lambda _: two_adapters().add_weighted_adapter(["one", "other"], [0.5, 0.5], "sum"),
    # Steering, training
    "strength=…": lambda _: set_talan_strength(make_model("qwen3"), float("nan")),
    "layers=…": lambda _: set_talan_strength(make_model("qwen3"), 0.5, adapter_name="default", layers=[0]),
    "model: no parameter requires a gradient": lambda folder: talan_param_groups(load(saved(folder)), lr=1e-3),
    "scope=…": lambda _: set_trainable(no_low_rank(), "low_rank"),
}
"""How a message of the page begins, and what brings it about."""
ELSEWHERE = {
    "peft_talan could not register itself": "tests/test_autoload.py",
    "model=…: its blocks": "tests/tuner/test_architectures.py",
    "talan_blocks: block ….… takes": "tests/tuner/test_architectures.py",
    "talan_layers: block … has hidden states of shape": "tests/tuner/test_streams.py",
    "talan_layers: a block has hidden states of shape": "tests/tuner/test_residual_streams.py",
    "continuous batching of this version": None,  # No version of transformers that may be installed is of this kind.
    "The side path depends on its input": "tests/tuner/test_merge.py",
    "merge_adapter() folds": "tests/tuner/test_merge.py",
    "…(use_vllm=True): vLLM would be sent": "tests/trainers/test_vllm_rollouts.py",
    "…: merged weights are without": "tests/trainers/test_async_rollouts.py",
    "…: adapter … has the strength": "tests/trainers/test_async_rollouts.py",
    "resume_from_checkpoint": "tests/processes/test_processes.py",
    "tp_plan": "tests/processes/test_processes.py",
}
"""Messages that need more than a small model, and where they are seen."""


def test_the_lines_at_the_import_are_those_of_other_libraries() -> None:
    script = "import sys, peft; print('##', file=sys.stderr); from peft_talan import TalanConfig"
    alone = {**os.environ, "PEFT_TALAN_AUTOLOAD": "0"}  # `import peft` is then PEFT's and what it imports
    ran = subprocess.run([sys.executable, "-c", script], env=alone, capture_output=True, text=True, check=True)
    assert ran.stderr.endswith("##\n") and not ran.stdout


def heading(beginning: str) -> str:
    """The only message of the page that begins so."""
    messages = re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)
    (message,) = [message for message in messages if message.startswith(beginning)]
    return message


def test_every_message_of_the_page_is_brought_about_somewhere() -> None:
    count = len(re.findall(r"^### `", PAGE.read_text(), re.MULTILINE))
    assert len({heading(beginning) for beginning in (*PROVOCATIONS, *ELSEWHERE)}) == count
    assert all((PAGE.parents[2] / place).exists() for place in ELSEWHERE.values() if place)


@pytest.mark.parametrize("beginning", PROVOCATIONS)
@pytest.mark.filterwarnings("ignore")
def test_the_message_comes_where_the_page_says(beginning: str, tmp_path: Path) -> None:
    pattern = re.escape(heading(beginning)).replace("…", ".*")
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.compile(pattern, re.DOTALL)):
        PROVOCATIONS[beginning](tmp_path)
