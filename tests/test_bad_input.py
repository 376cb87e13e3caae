"""Bad configurations and checkpoints: a clear error, and the model as it was, through every entrance.

`PEFT_TALAN_FUZZ_EXAMPLES` sets how many cases each fuzz test draws.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from peft_talan import TalanConfig

from .small_models import make_base, make_config, make_model, make_tokens

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    max_examples=int(os.environ.get("PEFT_TALAN_FUZZ_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WEIGHTS = "adapter_model.safetensors"
Seen = dict[str, object]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain(value: object) -> object:
    """An attribute as something that can be compared later."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(one) for one in (sorted(value, key=str) if isinstance(value, set) else value)]
    if isinstance(value, LoraConfig):
        return (type(value), value.to_dict())
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def picture(model: nn.Module) -> Seen:
    """All that can be seen of a model: classes, attributes, hooks, tensors, what trains, configurations."""
    seen: Seen = {}
    for name, module in model.named_modules():
        seen[f"{name}: class"] = type(module)
        for attribute, value in vars(module).items():
            seen[f"{name}: {attribute}"] = plain(value)
    for name, parameter in model.named_parameters():
        seen[f"{name}: trains"] = parameter.requires_grad
        seen[f"{name}: identity"] = id(parameter)
    return seen


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def assert_unchanged(model: nn.Module, before: Seen) -> None:
    after = picture(model)
    changed = [key for key in before.keys() | after.keys() if not equal(before.get(key), after.get(key))]
    assert not changed, sorted(changed)[:10]


def base() -> PreTrainedModel:
    return make_base("qwen3", torch.float32)


def wrapped() -> PeftModel:
    return make_model("qwen3", dtype=torch.float32)


def adapted() -> PreTrainedModel:
    model = base()
    model.add_adapter(make_config())
    return model


CONFIG_ENTRANCES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, TalanConfig], object]]] = {
    "get_peft_model": (base, get_peft_model),
    "inject_adapter_in_model": (base, lambda model, config: inject_adapter_in_model(config, model)),
    "PEFT's add_adapter": (wrapped, lambda model, config: model.add_adapter("new", config)),
    "transformers' add_adapter": (base, lambda model, config: model.add_adapter(config)),
    "transformers' second add_adapter": (adapted, lambda model, config: model.add_adapter(config, "new")),
}
FOLDER_ENTRANCES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], object]]] = {
    "from_pretrained": (base, PeftModel.from_pretrained),
    "from_pretrained, meta": (base, lambda m, path: PeftModel.from_pretrained(m, path, low_cpu_mem_usage=True)),
    "from_pretrained, to train": (base, lambda m, path: PeftModel.from_pretrained(m, path, is_trainable=True)),
    "load_adapter": (wrapped, lambda model, path: model.load_adapter(path, "new")),
}


class Entrance:
    """An entrance and a model that is used for one case after the other, as long as it stays as it was."""

    def __init__(self, make: Callable[[], nn.Module], enter: Callable[[nn.Module, object], object]) -> None:
        self.make, self.enter = make, enter
        self.renew()

    def renew(self) -> None:
        with torch.random.fork_rng():
            self.model = self.make()
        self.before = picture(self.model)

    def refusal(self, what: object, runs: bool = True) -> Exception | None:
        """Try; a refusal must leave the model as it was. None: it was taken, and then it must run."""
        try:
            result = self.enter(self.model, what)
        except Exception as error:
            assert_unchanged(self.model, self.before)
            return error
        model = result if isinstance(result, nn.Module) else self.model
        self.renew()
        if runs:
            with torch.no_grad():
                assert model(make_tokens()).logits.isfinite().all()
        return None


@pytest.fixture(scope="module")
def config_entrances() -> dict[str, Entrance]:
    return {name: Entrance(*entrance) for name, entrance in CONFIG_ENTRANCES.items()}


@pytest.fixture(scope="module")
def folder_entrances() -> dict[str, Entrance]:
    return {name: Entrance(*entrance) for name, entrance in FOLDER_ENTRANCES.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_model("qwen3", dtype=torch.float32).save_pretrained(folder)
    return folder


def copy(saved: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in saved.glob("adapter_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


JUNK = st.one_of(
    st.sampled_from(
        [None, True, False, -1, 0, 1, 3, 10**9, 10**18, 0.0, 0.5, -0.5, 1e300, float("nan"), float("inf")]
    ),
    st.sampled_from(["", "all", "none", "default", "q_proj", "model.layers", "(", "lora_only", "gaussian", "cpu"]),
    st.lists(st.sampled_from([0, -1, 99, 0.5, 2.0, True, "q_proj", "x", None]), max_size=3),
    st.dictionaries(st.sampled_from(["q_proj", "x", "("]), st.sampled_from([0, 2, -1, 0.5, "y", None]), max_size=2),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
)
# `runtime_config` is no field of a file, and `auto_mapping` is for whoever builds a base model from it.
FIELDS = [field.name for field in fields(TalanConfig) if field.name not in ("peft_type", "runtime_config")]


@FUZZ
@given(field=st.sampled_from(FIELDS), value=JUNK, entrance=st.sampled_from(list(CONFIG_ENTRANCES)))
def test_fuzz_configs(field: str, value: object, entrance: str, config_entrances: dict[str, Entrance]) -> None:
    try:
        config = make_config(**{field: value})
    except Exception as error:
        assert not field.startswith("talan_") or (isinstance(error, ValueError) and field in str(error))
        return
    # What PEFT takes of its own fields is PEFT's matter, and need not run.
    config_entrances[entrance].refusal(config, runs=field.startswith("talan_"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


@FUZZ
@given(data=st.data(), entrance=st.sampled_from(list(FOLDER_ENTRANCES)))
def test_fuzz_bytes_of_a_checkpoint(
    data: st.DataObject, entrance: str, saved: Path, folder_entrances: dict[str, Entrance], tmp_path: Path
) -> None:
    folder = copy(saved, tmp_path / "damaged")
    content = bytearray((saved / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    kind = data.draw(st.sampled_from(["truncated", "header", "length", "anywhere", "garbage", "longer"]))
    if kind == "truncated":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "header":
        for place in data.draw(st.lists(st.integers(8, header - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
    elif kind == "length":
        content[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    elif kind == "anywhere":
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=64)):
            content[place] ^= data.draw(st.integers(1, 255))
    elif kind == "garbage":
        content = bytearray(data.draw(st.binary(max_size=200)))
    else:
        content += data.draw(st.binary(min_size=1, max_size=50))
    (folder / WEIGHTS).write_bytes(content)
    error = folder_entrances[entrance].refusal(folder, runs=False)
    assert error is None or isinstance(error, ValueError), repr(error)
    if kind in ("truncated", "garbage", "longer"):
        assert error is not None


CHANGES = ["nan", "infinite", "shape", "transposed", "empty", "scalar", "integers", "bool", "gone", "renamed", "extra"]


def change(tensors: dict[str, torch.Tensor], key: str, kind: str, place: int) -> None:
    tensor = tensors[key]
    if kind in ("nan", "infinite"):
        tensor.view(-1)[place % tensor.numel()] = torch.nan if kind == "nan" else -torch.inf
    elif kind == "shape":
        tensors[key] = torch.cat([tensor, tensor[:1]])
    elif kind == "transposed":
        tensors[key] = tensor.T.contiguous() if tensor.dim() > 1 else tensor[None]
    elif kind == "empty":
        tensors[key] = tensor[:0].clone()
    elif kind == "scalar":
        tensors[key] = tensor.view(-1)[0].clone()
    elif kind in ("integers", "bool"):
        tensors[key] = tensor.to(torch.int64 if kind == "integers" else torch.bool)
    elif kind == "extra":
        tensors[key.replace("layers.", "layers.9")] = tensor.clone()
    else:
        del tensors[key]
        if kind == "renamed":
            tensors[key.replace("lora_", "lora_x")] = tensor


@FUZZ
@given(data=st.data(), kind=st.sampled_from(CHANGES), entrance=st.sampled_from(list(FOLDER_ENTRANCES)))
def test_fuzz_tensors_of_a_checkpoint(
    data: st.DataObject, kind: str, entrance: str, saved: Path, folder_entrances: dict[str, Entrance], tmp_path: Path
) -> None:
    tensors = tensors_of(saved)
    key = data.draw(st.sampled_from(sorted(tensors)))
    change(tensors, key, kind, data.draw(st.integers(0, 10**4)))
    folder = copy(saved, tmp_path / "changed")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    error = folder_entrances[entrance].refusal(folder, runs=False)
    if error is None:
        # Of the low-rank half, PEFT reports tensors without a place and places without a tensor, and goes on.
        assert kind in ("gone", "renamed", "extra", "transposed") and "talan" not in key
        assert kind != "transposed" or tensors[key].shape == tensors_of(saved)[key].shape
        return
    assert isinstance(error, ValueError), repr(error)
    assert "'new'" in str(error) or "'default'" in str(error)
    assert key.split(".")[-1] in str(error) or kind in ("extra", "renamed")


@FUZZ
@given(data=st.data(), kind=st.sampled_from(CHANGES))
def test_fuzz_tensors_set_directly(data: st.DataObject, kind: str, saved: Path, setting: Entrance) -> None:
    tensors = tensors_of(saved)
    key = data.draw(st.sampled_from(sorted(tensors)))
    change(tensors, key, kind, data.draw(st.integers(0, 10**4)))
    error = setting.refusal(tensors)
    if error is None:
        # A part of an adapter may be set; what has no place is reported by PEFT.
        assert kind in ("gone", "renamed", "extra", "transposed")
    else:
        assert isinstance(error, ValueError) and "'default'" in str(error), repr(error)


@pytest.fixture(scope="module")
def setting() -> Entrance:
    return Entrance(wrapped, set_peft_model_state_dict)


@FUZZ
@given(field=st.sampled_from(FIELDS), value=JUNK, entrance=st.sampled_from(list(FOLDER_ENTRANCES)))
def test_fuzz_saved_configs(
    field: str, value: object, entrance: str, saved: Path, folder_entrances: dict[str, Entrance], tmp_path: Path
) -> None:
    folder = copy(saved, tmp_path / "config")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    error = folder_entrances[entrance].refusal(folder, runs=field.startswith("talan_"))
    assert error is None or not field.startswith("talan_") or isinstance(error, ValueError), repr(error)
