"""Bad configurations and checkpoints by kind: a clear error, and the model as it was, through every entrance."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Qwen3Config

from peft_talan import TalanConfig, __version__
from peft_talan.checkpoint.rollback import unchanged_on_error

from ..small_models import CONFIGS, make_config, make_lora_config, make_model
from .entrances import WEIGHTS, Entrance, adapted, assert_unchanged, base, change, copy, picture, tensors_of, wrapped


def test_newer_major_version_is_refused_with_the_remedy(
    saved: Path, folder_entrances: dict[str, Entrance], tmp_path: Path
) -> None:
    fields_of_file = json.loads((saved / "adapter_config.json").read_text())
    assert fields_of_file["talan_version"] == __version__
    folder = copy(saved, tmp_path / "newer")
    newer = f"{int(__version__.split('.')[0]) + 1}.0.0"
    changed = {**fields_of_file, "talan_version": newer, "talan_mixer": "not known yet", "talan_news": 1}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    for entrance in folder_entrances.values():
        error = entrance.refusal(folder)
        assert isinstance(error, ValueError) and newer in str(error) and "update the package" in str(error)
    model, before = base(), picture(base())
    with pytest.raises(ValueError, match="newer major version"):
        model.load_adapter(str(folder))
    assert picture(model).keys() == before.keys()


def test_older_adapters_without_the_field_load(
    saved: Path, folder_entrances: dict[str, Entrance], tmp_path: Path
) -> None:
    folder = copy(saved, tmp_path / "older")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "talan_version"}))
    for entrance in folder_entrances.values():
        assert entrance.refusal(folder) is None


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("whole", [True, False])
def test_no_code_in_a_pickle_runs(
    whole: bool, saved: Path, folder_entrances: dict[str, Entrance], tmp_path: Path
) -> None:
    folder = copy(saved, tmp_path / "pickled")
    mark = tmp_path / "it ran"
    tensors = tensors_of(saved)
    torch.save(
        Malicious(mark) if whole else {**tensors, "x.lora_A.weight": Malicious(mark)}, folder / "adapter_model.bin"
    )
    (folder / WEIGHTS).unlink()
    for entrance in folder_entrances.values():
        error = entrance.refusal(folder)
        assert isinstance(error, ValueError) and "can't be read" in str(error)
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        base().load_adapter(str(folder))
    assert not mark.exists()
    # The very file does run code where it is unpickled as it is.
    torch.load(folder / "adapter_model.bin", weights_only=False)
    assert mark.exists()


def test_a_pickle_of_weights_loads(saved: Path, tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists() and not (tmp_path / WEIGHTS).exists()
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    expected = get_peft_model_state_dict(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in get_peft_model_state_dict(loaded).items())


@pytest.mark.parametrize(
    "options",
    [
        {"talan_dim": 10**9},
        {"talan_slots": 10**9},
        {"talan_dim": 2**20},
        {"talan_slots": 2**20, "talan_mixer": "mlp"},
        {"r": 10**9},
        {"r": 2**20},
        {"rank_pattern": {"q_proj": 2**20}},
    ],
)
def test_huge_sizes_are_refused_before_memory_is_asked_for(
    options: dict[str, object], config_entrances: dict[str, Entrance]
) -> None:
    try:
        config = make_config(**options)
    except ValueError as error:
        assert next(iter(options)) in str(error)
        return
    for entrance in config_entrances.values():
        error = entrance.refusal(config)
        assert isinstance(error, ValueError) and next(iter(options)) in str(error)


def test_header_that_claims_petabytes(saved: Path, folder_entrances: dict[str, Entrance], tmp_path: Path) -> None:
    folder = copy(saved, tmp_path / "petabytes")
    name = next(iter(tensors_of(saved)))
    header = json.dumps({name: {"dtype": "F32", "shape": [2**24, 2**26], "data_offsets": [0, 2**52]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    for entrance in folder_entrances.values():
        error = entrance.refusal(folder)
        assert isinstance(error, ValueError) and "can't be read" in str(error)


@pytest.mark.parametrize("options", [{}, {"r": 0}])
def test_adapter_of_another_architecture(
    options: dict[str, object], folder_entrances: dict[str, Entrance], tmp_path: Path
) -> None:
    make_model("gpt2", make_config(**options), torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["talan_layers"] = [0, 2]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for entrance in folder_entrances.values():
        error = entrance.refusal(tmp_path)
        assert isinstance(error, ValueError) and "side path" in str(error)


def test_a_name_that_is_taken(saved: Path) -> None:
    model = wrapped()
    before = picture(model)
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", make_config())
    for again in (lambda: get_peft_model(model.get_base_model(), make_config()),
                  lambda: inject_adapter_in_model(make_config(), model.get_base_model()),
                  lambda: PeftModel.from_pretrained(model.get_base_model(), saved)):  # fmt: skip
        with pytest.raises(ValueError, match="adapter_name='default': the model already has"):
            again()
    assert_unchanged(model, before)
    one = adapted()
    before = picture(one)
    with pytest.raises(ValueError, match="default already exists"):
        one.add_adapter(make_config())
    with pytest.raises(ValueError, match="default already exists"):
        one.load_adapter(str(saved))
    assert_unchanged(one, before)


def test_failure_in_the_middle_of_the_injection(config_entrances: dict[str, Entrance]) -> None:
    # PEFT finds out only at the norm that it has no layer for it, with projections wrapped by then.
    config = make_config(target_modules=["q_proj", "input_layernorm"])
    for entrance in config_entrances.values():
        error = entrance.refusal(config)
        assert isinstance(error, ValueError) and "is not supported" in str(error)


def test_transformers_takes_a_good_adapter_after_a_bad_one() -> None:
    model = base()
    with pytest.raises(ValueError, match="talan_layers"):
        model.add_adapter(make_config(talan_layers=[99]))
    model.add_adapter(make_config())
    assert model.active_adapters() == ["default"]


def test_classifier_beside_a_bad_side_path(tmp_path: Path) -> None:
    labels = {"num_labels": 2}

    def classifier() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(Qwen3Config(**{**CONFIGS["qwen3"].to_dict(), **labels}))

    get_peft_model(classifier(), make_config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    model = classifier()
    PeftModel.from_pretrained(classifier(), tmp_path)
    tensors = tensors_of(tmp_path)
    change(tensors, next(name for name in sorted(tensors) if "lora_talan_write" in name), "nan", 0)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    before = picture(model)
    with pytest.raises(ValueError, match="NaN"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_unchanged(model, before)


def test_configuration_of_a_bad_checkpoint_still_trains_anew(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path / "nan")
    tensors = tensors_of(folder)
    change(tensors, next(iter(tensors)), "nan", 0)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    get_peft_model(base(), PeftConfig.from_pretrained(folder))
    changed = TalanConfig.from_pretrained(folder)
    changed.r = 2
    get_peft_model(base(), changed)


def damaged(make: Callable[[], nn.Module], kind: str, folder: Path) -> None:
    make().save_pretrained(folder)
    if kind == "truncated":
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:-50])
        return
    tensors = tensors_of(folder)
    change(tensors, next(name for name in sorted(tensors) if "lora_A" in name), kind, 0)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


NOT_MET: dict[str, Callable[[nn.Module, Path], object]] = {
    "transformers' load_adapter": lambda model, folder: model.load_adapter(str(folder)),
    "from_pretrained(config=...)": lambda model, folder: PeftModel.from_pretrained(
        model, folder, config=PeftConfig.from_pretrained(folder)
    ),
}


@pytest.mark.parametrize("tuner", ["talan", "lora"])
@pytest.mark.parametrize("kind", ["truncated", "shape"])
@pytest.mark.parametrize("entrance", NOT_MET)
def test_entrances_that_name_no_checkpoint_to_the_tuner(entrance: str, kind: str, tuner: str, tmp_path: Path) -> None:
    """PEFT and transformers inject here before they read, and tell no tuner from where: plain LoRA stays behind, too.

    The call fails all the same, and `unchanged_on_error` around it gives the model back.
    """
    config = {"talan": make_config, "lora": make_lora_config}[tuner]
    damaged(lambda: make_model("qwen3", config(), torch.float32), kind, tmp_path)
    model = base()
    before = picture(model)
    with pytest.raises((ValueError, RuntimeError, OSError, SafetensorError)), unchanged_on_error(model):
        NOT_MET[entrance](model, tmp_path)
    assert_unchanged(model, before)
    with pytest.raises((ValueError, RuntimeError, OSError, SafetensorError)):
        NOT_MET[entrance](model, tmp_path)
    assert any("lora_" in name for name in model.state_dict())


@pytest.mark.parametrize("tuner", ["talan", "lora"])
def test_nan_is_refused_where_lora_takes_it_but_not_by_transformers_own_loading(tuner: str, tmp_path: Path) -> None:
    config = {"talan": make_config, "lora": make_lora_config}[tuner]
    damaged(lambda: make_model("qwen3", config(), torch.float32), "nan", tmp_path)
    if tuner == "talan":
        with pytest.raises(ValueError, match="NaN"):
            NOT_MET["from_pretrained(config=...)"](base(), tmp_path)
    else:
        NOT_MET["from_pretrained(config=...)"](base(), tmp_path)
    model = base()
    NOT_MET["transformers' load_adapter"](model, tmp_path)
    assert not all(tensor.isfinite().all() for tensor in model.state_dict().values())
