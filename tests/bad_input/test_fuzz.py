"""Random fields, bytes and tensors, through every entrance: a clear error, the model as it was, or a model that runs.

`PEFT_TALAN_FUZZ_EXAMPLES` sets how many cases each test draws.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from peft import set_peft_model_state_dict
from safetensors.torch import save_file

from peft_talan import TalanConfig

from ..small_models import make_config
from .entrances import (
    CHANGES,
    CONFIG_ENTRANCES,
    FOLDER_ENTRANCES,
    WEIGHTS,
    Entrance,
    change,
    copy,
    tensors_of,
    wrapped,
)

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    max_examples=int(os.environ.get("PEFT_TALAN_FUZZ_EXAMPLES", "30")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
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
        # Of the LoRA weights, PEFT reports tensors without a place and places without a tensor, and goes on.
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
# PEFT trains tokens wherever the field is not None, and then asks the checkpoint for them, of no token, too.
@example(field="trainable_token_indices", value=[], entrance="from_pretrained")
def test_fuzz_saved_configs(
    field: str, value: object, entrance: str, saved: Path, folder_entrances: dict[str, Entrance], tmp_path: Path
) -> None:
    folder = copy(saved, tmp_path / "config")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    error = folder_entrances[entrance].refusal(folder, runs=field.startswith("talan_"))
    assert error is None or not field.startswith("talan_") or isinstance(error, ValueError), repr(error)
