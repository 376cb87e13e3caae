"""Every wrong value, type or combination is refused by field, value and remedy, before a model is touched."""

from __future__ import annotations

import json
import pickle
from array import array
from collections import deque
from enum import Enum
from pathlib import Path

import numpy
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from torch import nn

from peft_talan import TalanConfig, TalanModel

from .small_models import DEPTH, logits, make_base, make_config

WRONG: dict[str, list[object]] = {
    "talan_layers": [
        *("every_1", "every_0", "every_04", "every_4th", "every_-2", "every_2\n", "every_", "every_99999999"),
        ["every_2"],
        *("first", [], [0.5, 3], [1.5], [-0.1], [True], [None], 3, {"0"}, [float("nan")]),
        *(b"ab", bytearray(b"ab"), {0, 1}, {0: 1}, [b"a"], [[0, 1]]),
    ],
    "talan_position": ["middle", None, 0],
    "talan_slots": [0, -1, 2.0, "8", True, None],
    "talan_dim": [0, -4, 1.5, None],
    "talan_mixer": ["blender", None, 1],
    "talan_writeback": ["erase", None],
    "talan_cap": [0, -0.1, float("nan"), float("inf"), "0.1", None],
    "talan_alpha": [-1.0, float("nan"), float("inf"), "1", None],
    "talan_dropout": [-0.1, 1.0, 2, "0.1"],
    "talan_trainable": ["all", None],
    "talan_grad_scale": [-1, float("nan"), "1"],
    "talan_memory_scope": ["future", None],
    "init_talan_weights": ["zeros", 1],
    "talan_blocks": ["", 3],
    "talan_hidden_size": [0, -1, "64"],
    "r": [-1, 2.5, "8", True],
}
CASES = [(field, value) for field, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{field}={value!r}" for field, value in CASES])
def test_wrong_value_is_named_with_its_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as error:
        TalanConfig(**{field: value})
    assert repr(value) in str(error.value)


class OfEnum(Enum):
    SLOTS = 4
    MIXER = "mlp"


SAVED_AS: list[tuple[str, object, object]] = [
    ("talan_layers", range(3), [0, 1, 2]),
    ("talan_layers", (0.25, 0.5), [0.25, 0.5]),
    ("talan_layers", numpy.arange(2), [0, 1]),
    ("talan_layers", [numpy.int64(1), torch.tensor(2)], [1, 2]),
    ("talan_layers", torch.tensor([0.25, 0.5]), [0.25, 0.5]),
    ("talan_layers", array("i", [1, 2]), [1, 2]),
    ("talan_layers", deque([1]), [1]),
    ("talan_slots", numpy.int64(4), 4),
    ("talan_slots", OfEnum.SLOTS, 4),
    ("talan_mixer", OfEnum.MIXER, "mlp"),
    ("talan_alpha", numpy.float32(0.5), 0.5),
    ("talan_hidden_size", torch.tensor(32), 32),
    ("init_talan_weights", numpy.bool_(False), False),
    ("r", numpy.int32(2), 2),
    ("lora_alpha", numpy.float64(2.5), 2.5),
    ("rank_pattern", {"q_proj": numpy.int64(2)}, {"q_proj": 2}),
    ("layers_to_transform", range(2), [0, 1]),
    ("target_modules", ("q_proj", "v_proj"), {"q_proj", "v_proj"}),
    ("modules_to_save", ("lm_head",), ["lm_head"]),
    ("base_model_name_or_path", Path("base"), "base"),
]


@pytest.mark.parametrize(("field", "value", "plain"), SAVED_AS, ids=[f"{f}={v!r}" for f, v, _ in SAVED_AS])
def test_numbers_and_sequences_of_other_libraries_are_saved_plain(
    field: str, value: object, plain: object, tmp_path: Path
) -> None:
    config = TalanConfig(**{field: value})
    assert getattr(config, field) == plain and type(getattr(config, field)) is type(plain)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert getattr(again, field) == plain and again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("field", "value"), [("revision", b"main"), ("revision", object()), ("auto_mapping", {(1,): 2})]
)
def test_what_no_file_can_hold_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}=.*can't be saved"):
        TalanConfig(**{field: value})


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_bidirectional_memory_is_refused_for_tasks_that_generate(task_type: str) -> None:
    with pytest.raises(ValueError, match=f"talan_memory_scope='bidirectional'.*{task_type}.*'causal'"):
        TalanConfig(talan_memory_scope="bidirectional", task_type=task_type)


@pytest.mark.parametrize(
    "options",
    [
        {"layer_replication": [(0, 2), (1, 3)]},
        {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        {"megatron_config": {"a": 1}},
        {"r": 0, "target_parameters": ["experts.gate_up_proj"]},
        {"r": 0, "talan_trainable": "low_rank"},
    ],
    ids=lambda options: next(iter(reversed(options))),
)
def test_lora_options_that_can_not_work_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="|".join(options)):
        TalanConfig(**options)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([DEPTH], "out of range"),
        ([-DEPTH - 1], "out of range"),
        ([1, 1 - DEPTH], "named twice"),
        (f"every_{DEPTH + 1}", f"the model has {DEPTH} blocks"),
    ],
)
def test_layers_that_the_model_does_not_have(layers: object, message: str) -> None:
    base = make_base("qwen3")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=f"talan_layers=.*{message}"):
        get_peft_model(base, make_config(talan_layers=layers))
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3]),
        ([-1, 0], [0, 3]),
        ([0.0, 0.5, 1.0], [0, 2, 3]),
        ([0.5, 0.6], [2]),
        ((1, 2), [1, 2]),
        ("every_2", [1, 3]),
        ("every_3", [2]),
        ("every_4", [3]),
        ("recall", [2, 3]),
    ],
)
def test_layers_in_all_their_forms(layers: object, expected: list[int]) -> None:
    model = get_peft_model(make_base("qwen3"), make_config(talan_layers=layers))
    blocks = model.base_model.model.model.layers
    assert [index for index, block in enumerate(blocks) if hasattr(block, "talan")] == expected


def test_the_delta_rule_has_no_bidirectional_memory() -> None:
    with pytest.raises(ValueError, match=r"talan_memory_scope='bidirectional': talan_mixer='delta'.*'causal'"):
        TalanConfig(talan_mixer="delta", talan_memory_scope="bidirectional")


def test_a_soft_cap_is_bounded_and_not_for_the_delta_rule() -> None:
    for cap in (0.5, 11, float("nan"), True, "5"):
        with pytest.raises(ValueError, match=r"talan_soft_cap=.*from 1 to 10"):
            TalanConfig(talan_soft_cap=cap)
    with pytest.raises(ValueError, match=r"talan_soft_cap=7.0: talan_mixer='delta'"):
        TalanConfig(talan_mixer="delta", talan_soft_cap=7.0)
    assert TalanConfig(talan_mixer="delta").side_path_options.soft_cap == TalanConfig().talan_soft_cap == 5.0


def test_every_nth_block_is_saved_by_its_name(tmp_path: Path) -> None:
    model = get_peft_model(make_base("qwen3"), make_config(talan_layers="every_2"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["talan_layers"] == "every_2"
    loaded = PeftModel.from_pretrained(make_base("qwen3"), tmp_path)
    assert loaded.peft_config["default"].talan_layers == "every_2"
    assert torch.equal(logits(loaded.double()), logits(model.double()))


def test_default_layers_fit_any_depth() -> None:
    model = get_peft_model(make_base("qwen3"), make_config(talan_layers=None))
    assert any(hasattr(block, "talan") for block in model.base_model.model.model.layers)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(4, 4)])
        self.second = nn.ModuleList([nn.Linear(4, 4)])


def test_blocks_and_width_that_can_not_be_found_name_the_fields() -> None:
    with pytest.raises(ValueError, match=r"talan_blocks=None.*set talan_blocks"):
        get_peft_model(Unknown(), TalanConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"talan_blocks='third'.*'first', 'second'"):
        get_peft_model(Unknown(), TalanConfig(target_modules=["0"], talan_blocks="third"))
    with pytest.raises(ValueError, match=r"talan_hidden_size=None.*set talan_hidden_size"):
        get_peft_model(Unknown(), TalanConfig(target_modules=["0"], talan_blocks="first"))


def test_lora_options_go_through() -> None:
    config = make_config(
        r=6,
        lora_alpha=12,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["v_proj"],
        layers_to_transform=[1],
    )
    model = get_peft_model(make_base("qwen3"), config)
    ranks = {name: p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks == {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight": 2}


def test_the_type_is_a_real_member() -> None:
    config = TalanConfig()
    assert isinstance(config.peft_type, PeftType)
    assert config.peft_type is PeftType.TALAN
    assert isinstance(get_peft_model(make_base("qwen3"), make_config()).base_model, TalanModel)


def test_configs_pickle() -> None:
    config = make_config()
    assert pickle.loads(pickle.dumps(config)) == config


def test_float16_base_keeps_adapter_in_float32_unless_told_otherwise() -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.float16)):
        base = make_base("qwen3", torch.float16)
        model = get_peft_model(base, make_config(), autocast_adapter_dtype=autocast)
        side_path = {p.dtype for name, p in model.named_parameters() if ".talan." in name}
        low_rank = {p.dtype for name, p in model.named_parameters() if "lora_A" in name}
        assert side_path == low_rank == {dtype}
