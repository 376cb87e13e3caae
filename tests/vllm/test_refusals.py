"""What a side path can't go along with is refused before a model is built, by name and with a remedy."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_talan.serving.vllm.plugin import register

from . import engines

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "speculative decoding": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "speculative_config: .* start vLLM without",
    ),
    "a connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "kv_connector='ExampleConnector': .* start vLLM without",
    ),
    "offloaded pages": ({"kv_offloading_size": 1.0}, "kv_connector=.* start vLLM without"),
    "another scheduler": (
        {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
        "scheduler_cls=.* leave the option out",
    ),
    "a loader of its own": ({"load_format": "tensorizer"}, "load_format='tensorizer': .* use 'auto'"),
    "pipeline stages": ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: .* use tensor_parallel_size"),
    "no strength": ({"additional_config": {"talan_strength": "much"}}, "strength='much': give a finite number"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    engines.save_model(path, "qwen3")
    return path


def configure(folder: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**engines.engine_options(folder, **options)).create_engine_config()


@pytest.mark.parametrize("kind", OPTIONS)
def test_options(kind: str, folder: Path) -> None:
    options, message = OPTIONS[kind]
    with pytest.raises(ValueError, match=message):
        configure(folder, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"talan_memory_scope": "bidirectional", "task_type": None}, "talan_memory_scope='bidirectional'"),
        ({"r": 4, "target_modules": ["q_proj"]}, "low-rank half .* is not merged; run `peft-talan merge`"),
    ],
)
def test_adapters(fields: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ValueError, match=message):
        configure(tmp_path)


def test_vllms_own_adapters_are_not_side_paths(folder: Path) -> None:
    """As an adapter of vLLM's (`--lora-modules`), the folder would lose its side path: vLLM refuses its tensors."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper(r=4, lora_alpha=8, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"talan\..* is unsupported LoRA weight"):
        LoRAModel.from_local_checkpoint(str(folder), {"q_proj"}, helper, device="cpu")


def test_strengths_of_requests(folder: Path) -> None:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from peft_talan.serving.vllm.strength import check_request

    config = configure(folder)

    def check(strength: Any, **fields: Any) -> None:
        names = ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
        parameters = SamplingParams(extra_args={"talan_strength": strength})
        given = {"request_id": "0", "prompt_token_ids": [3], "sampling_params": parameters, "arrival_time": 0.0}
        check_request(config, EngineCoreRequest(**{**dict.fromkeys(names), **given, **fields}))

    check(0.5)
    for strength in ("much", float("nan"), None, True):
        with pytest.raises(ValueError, match=r"strength=.*: give a finite number"):
            check(strength)
    with pytest.raises(ValueError, match="the prompt comes in pieces"):
        check(0.5, resumable=True)
    config.parallel_config.distributed_executor_backend = "ray"
    with pytest.raises(ValueError, match="distributed_executor_backend='ray' do not get a request's strength"):
        check(0.5)


def test_plain_models_are_left_alone(tmp_path: Path) -> None:
    engines.save_model(tmp_path, "qwen3", merged=False)
    assert configure(tmp_path).scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    "method",
    [
        "vllm.model_executor.model_loader.base_loader.BaseModelLoader.create_model",
        "vllm.v1.worker.worker_base.WorkerWrapperBase.execute_model",
    ],
)
def test_a_version_of_vllm_without_the_methods_is_said(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is left as it is: a part of the changes would be worse than none."""
    from vllm.v1.engine.input_processor import InputProcessor

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
    plain = InputProcessor.process_inputs.__wrapped__
    monkeypatch.setattr(InputProcessor, "process_inputs", plain)
    monkeypatch.delattr(method)
    with pytest.warns(UserWarning, match=f"does not know this version of vLLM .*{method.rpartition('.')[2]}"):
        register()
    assert InputProcessor.process_inputs is plain


def test_a_name_that_vllm_lacks_is_said_before_the_model_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader import get_model_loader

    config = configure(folder)
    for module in [name for name in sys.modules if name.startswith("peft_talan.serving.vllm.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("vllm.utils.torch_utils.direct_register_custom_op")
    loader = get_model_loader(config.load_config)
    with pytest.raises(RuntimeError, match=r"this version of vLLM lacks .*direct_register_custom_op"):
        loader.create_model(vllm_config=config, model_config=config.model_config)


def test_where_blocks_carry_the_stream() -> None:
    from vllm.model_executor.models import commandr, gpt2, llama, stablelm

    from peft_talan.serving.vllm.blocks import StreamPlace

    def place(block: type[nn.Module]) -> StreamPlace:
        return StreamPlace.of("layers.0", block.__new__(block))

    assert place(llama.LlamaDecoderLayer) == StreamPlace(hidden_states=1, residual=2)
    # Its residual is only what is left over.
    assert place(commandr.CohereDecoderLayer) == StreamPlace(hidden_states=1, residual=None)
    assert place(stablelm.StablelmDecoderLayer) == StreamPlace(hidden_states=1, residual=None)
    assert place(gpt2.GPT2Block) == StreamPlace(hidden_states=0, residual=None)
    with pytest.raises(ValueError, match="forward has no argument 'hidden_states'"):
        place(nn.Linear)


def test_a_part_of_the_stream_is_not_lost() -> None:
    from peft_talan.serving.vllm.blocks import StreamPlace

    place = StreamPlace(hidden_states=1, residual=2)
    first, second = torch.ones(3, 4), torch.full((3, 4), 2.0)
    for args, kwargs in (((0, first, second), {}), ((0,), {"hidden_states": first, "residual": second})):
        args, kwargs = place.change_input(lambda h: 10 * h, args, kwargs)
        parts = (*args[1:], *kwargs.values())
        assert torch.equal(sum(parts), torch.full((3, 4), 30.0))
    args, _ = place.change_input(lambda h: 10 * h, (0, first, None), {})
    assert torch.equal(args[1], 10 * first)
    assert args[2] is None
    written, left = place.change_output(lambda h: 10 * h, (first, second))
    assert torch.equal(written + left, torch.full((3, 4), 30.0))
