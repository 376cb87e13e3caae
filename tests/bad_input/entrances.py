"""Every entrance by which a configuration or a checkpoint comes to a model, and what can be seen of that model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from peft_talan import TalanConfig

from ..small_models import make_base, make_config, make_model, make_tokens

WEIGHTS = "adapter_model.safetensors"
Seen = dict[str, object]


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
        except Exception as error:  # noqa: BLE001 - whatever the error is, the model must be as it was
            assert_unchanged(self.model, self.before)
            return error
        model = result if isinstance(result, nn.Module) else self.model
        self.renew()
        if runs:
            with torch.no_grad():
                assert model(make_tokens()).logits.isfinite().all()
        return None


def copy(saved: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in saved.glob("adapter_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


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
