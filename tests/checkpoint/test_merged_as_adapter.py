"""A merged model where an adapter is expected: refused by the argument and the call that loads it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftMixedModel, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from peft_talan import TalanConfig, export_lora, warm_start

from ..bad_input.entrances import adapted, assert_unchanged, base, picture, wrapped
from ..small_models import adapter_calls_of_transformers, logits, make_lora_config, make_model


def with_lora() -> PeftModel:
    return make_model("qwen3", make_lora_config(), torch.float32)


Route = tuple[str, Callable[[], nn.Module], Callable[..., object]]
READ = "pretrained_model_name_or_path"
ROUTES: dict[str, Route] = {
    "PeftModel.from_pretrained": ("model_id", base, PeftModel.from_pretrained),
    "PeftMixedModel.from_pretrained": ("model_id", base, PeftMixedModel.from_pretrained),
    "PeftModel.load_adapter": ("model_id", wrapped, lambda model, *a, **k: model.load_adapter(*a, "new", **k)),
    "PeftModel.load_adapter, over": (
        "model_id",
        wrapped,
        lambda model, *a, **k: model.load_adapter(*a, "default", **k),
    ),
    "PeftModel.load_adapter, over LoRA": (
        "model_id",
        with_lora,
        lambda model, *a, **k: model.load_adapter(*a, "default", **k),
    ),
    "AutoPeftModel": (READ, base, lambda _, *a, **k: AutoPeftModelForCausalLM.from_pretrained(*a, **k)),
    "PeftConfig": (READ, base, lambda _, *a, **k: PeftConfig.from_pretrained(*a, **k)),
    "TalanConfig": (READ, base, lambda _, *a, **k: TalanConfig.from_pretrained(*a, **k)),
}
OF_TRANSFORMERS: dict[str, Route] = {
    "load_adapter": ("peft_model_id", base, lambda model, *a, **k: model.load_adapter(*a, adapter_kwargs=k)),
    "second load_adapter": (
        "peft_model_id",
        adapted,
        lambda model, *a, **k: model.load_adapter(*a, "new", adapter_kwargs=k),
    ),
}
EVERY = [
    *(pytest.param(*route, id=name) for name, route in ROUTES.items()),
    *(pytest.param(*route, id=name, marks=adapter_calls_of_transformers) for name, route in OF_TRANSFORMERS.items()),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds merged models of TALAN and LoRA, one of them also deeper and as the hub's cache would have it."""
    folder = tmp_path_factory.mktemp("folder")
    make_model("qwen3", dtype=torch.float32).merge_and_unload().save_pretrained(folder / "merged")
    with_lora().merge_and_unload().save_pretrained(folder / "lora")
    shutil.copytree(folder / "merged", folder / "outer" / "inner")
    repository = folder / "cache" / "models--user--merged"
    for place in ("", "inner"):
        shutil.copytree(folder / "merged", repository / "snapshots" / ("0" * 40) / place, dirs_exist_ok=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("0" * 40)
    return folder


@pytest.mark.parametrize(("argument", "make", "call"), EVERY)
def test_every_route_names_the_call(
    argument: str, make: Callable[[], nn.Module], call: Callable[..., object], folder: Path
) -> None:
    model = make()
    before = picture(model)
    cached: dict[str, Any] = {"cache_dir": str(folder / "cache"), "local_files_only": True, "revision": "v1"}
    for name, options, place in (
        (str(folder / "merged"), {}, ""),
        (str(folder / "outer"), {"subfolder": "inner"}, ", subfolder='inner'"),
        ("user/merged", cached, ", revision='v1'"),
        ("user/merged", {**cached, "subfolder": "inner"}, ", subfolder='inner', revision='v1'"),
    ):
        loads = re.escape(f"AutoModelForCausalLM.from_pretrained({name!r}{place})")
        with pytest.raises(ValueError, match=rf"^{argument}='{re.escape(name)}': .*merged model.* {loads}$"):
            call(model, name, **options)
        with pytest.raises((ValueError, OSError)) as lora:
            call(model, str(folder / "lora"))
        assert "merged model" not in str(lora.value)
        assert_unchanged(model, before)


def test_a_configuration_that_is_given_makes_no_difference(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model_id=.*it is a merged model"):
        PeftModel.from_pretrained(base(), folder / "merged", config=make_lora_config())


def test_functions_of_this_package(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is a merged model"):
        warm_start(base(), folder / "merged")
    with pytest.raises(ValueError, match="it is a merged model"):
        export_lora(folder / "merged", tmp_path)


def test_an_adapter_beside_the_merged_model_is_loaded_or_told_of(folder: Path, tmp_path: Path) -> None:
    both = shutil.copytree(folder / "merged", tmp_path / "both")
    second = PeftModel(AutoModelForCausalLM.from_pretrained(both), make_lora_config(init_lora_weights=False)).eval()
    second.save_pretrained(both)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "merged"), both).eval()
    assert torch.equal(logits(loaded), logits(second))
    (both / "adapter_model.safetensors").unlink()
    with pytest.raises((ValueError, OSError)) as missing:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "merged"), both)
    assert "merged model" not in str(missing.value)
