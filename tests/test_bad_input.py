"""Bad configurations and checkpoints: a clear error, and the model as it was, through every entrance.

`PEFT_TALAN_FUZZ_EXAMPLES` sets how many cases each fuzz test draws.
"""

from __future__ import annotations

import json
import os
import pickle
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
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from peft_talan import TalanConfig, __version__
from peft_talan.rollback import unchanged_on_error

from .small_models import CONFIGS, make_base, make_config, make_lora_config, make_model, make_tokens

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    max_examples=int(os.environ.get("PEFT_TALAN_FUZZ_EXAMPLES", "30")),
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
        except Exception as error:  # noqa: BLE001 - whatever the error is, the model must be as it was
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
    except Exception as error:  # noqa: BLE001 - PEFT has errors of many kinds for its own fields
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
        assert isinstance(error, ValueError) and newer in str(error) and "pip install -U peft-talan" in str(error)
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
    def classifier() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(CONFIGS["qwen3"], num_labels=2)

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
