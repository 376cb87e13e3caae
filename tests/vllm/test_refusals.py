"""What a side path does not support is refused before a model is built, by name and with a remedy."""

from __future__ import annotations

import ast
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
    "another worker": ({"worker_cls": "vllm.v1.worker.gpu_worker.Worker"}, "worker_cls=.* leave the option out"),
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


def test_executors_that_do_not_call_a_worker_step_by_step(folder: Path) -> None:
    from peft_talan.serving.vllm.checks import check_engine

    config = configure(folder)
    for executor in ("uni", "mp", "external_launcher"):
        config.parallel_config.distributed_executor_backend = executor
        assert [side_path.adapter_name for side_path in check_engine(config)] == ["default"]
    config.parallel_config.distributed_executor_backend = "ray"  # vLLM refuses it where Ray is not installed
    with pytest.raises(ValueError, match=r"distributed_executor_backend='ray': .* use 'mp'"):
        check_engine(config)


@pytest.mark.parametrize(
    ("given", "left"),
    [("FULL_AND_PIECEWISE", "PIECEWISE"), ("FULL_DECODE_ONLY", "NONE"), ("FULL", "NONE"), ("PIECEWISE", "PIECEWISE")],
)
def test_no_cuda_graph_has_a_side_path_inside(given: str, left: str, folder: Path) -> None:
    from vllm.config import CUDAGraphMode

    from peft_talan.serving.vllm.checks import configure as configure_engine

    config = configure(folder)
    # As it is on a GPU: on processors, vLLM has set it to none by now.
    config.compilation_config.cudagraph_mode = CUDAGraphMode[given]
    configure_engine(config)
    assert config.compilation_config.cudagraph_mode is CUDAGraphMode[left]


def test_a_bidirectional_memory(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["talan"][0]["talan_memory_scope"] = "bidirectional"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="talan_memory_scope='bidirectional' of adapter 'default' can't generate"):
        configure(tmp_path)


def test_without_the_plugin_an_adapter_is_no_adapter_of_vllms(tmp_path: Path) -> None:
    """It would lose its side path: vLLM refuses its tensors."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    engines.make_model(engines.CONFIGS["qwen3"]).save_pretrained(tmp_path)
    helper = PEFTHelper(r=4, lora_alpha=8, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"talan\..* is unsupported LoRA weight"):
        LoRAModel.from_local_checkpoint(str(tmp_path), {"q_proj"}, helper, device="cpu")


def test_strengths_of_requests(folder: Path) -> None:
    """By vLLM's own check of each request; another processor of logits, which a server was given, stays."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.input_processor import InputProcessor

    other = "vllm.v1.sample.logits_processor:MinPLogitsProcessor"
    config = configure(folder, logits_processors=[other])
    assert config.model_config.logits_processors[0] == other
    check = InputProcessor(config).validate_logits_processors_params
    check(SamplingParams())
    check(SamplingParams(extra_args={"talan_strength": 0.5}))
    for strength in ("much", float("nan"), None, True):
        with pytest.raises(VLLMClientError, match=r"strength=.*: give a finite number"):
            check(SamplingParams(extra_args={"talan_strength": strength}))


def test_plain_models_and_adapters_are_left_alone(tmp_path: Path) -> None:
    engines.save_model(tmp_path / "base", "qwen3", merged=False)
    base = engines.make_base(engines.CONFIGS["qwen3"])
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    adapters: dict[str, Any] = {"additional_config": {"talan": {"adapters": [str(tmp_path / "lora")]}}}
    for options in ({}, {"enable_lora": True}, {"enable_lora": True, **adapters}):
        assert configure(tmp_path / "base", **options).scheduler_config.scheduler_cls is None


def test_a_version_of_vllm_without_the_method_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    configuring = EngineArgs.create_engine_config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
    assert EngineArgs.create_engine_config is configuring
    monkeypatch.delattr(EngineArgs, "create_engine_config")
    with pytest.warns(UserWarning, match=r"does not know this version of vLLM .*create_engine_config"):
        register()


def test_a_name_that_vllm_lacks_is_said_before_the_model_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("peft_talan.serving.vllm.")]:
        if module != "peft_talan.serving.vllm.plugin":
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("vllm.utils.torch_utils.direct_register_custom_op")
    with pytest.raises(RuntimeError, match=r"this version of vLLM lacks .*direct_register_custom_op"):
        configure(folder)


@pytest.mark.parametrize("option", ["scheduler_cls", "worker_cls"])
def test_options_that_were_changed_later(option: str, folder: Path) -> None:
    from vllm.model_executor.model_loader import get_model_loader

    import peft_talan.serving.vllm.loader  # noqa: F401 - as the worker's module does

    config = configure(folder)
    owner = config.scheduler_config if option == "scheduler_cls" else config.parallel_config
    setattr(owner, option, None if option == "scheduler_cls" else "vllm.v1.worker.cpu_worker.CPUWorker")
    loader = get_model_loader(config.load_config)
    with pytest.raises(ValueError, match=rf"{option}=.*configured without the plugin"):
        loader.create_model(vllm_config=config, model_config=config.model_config)


def test_where_blocks_carry_the_stream() -> None:
    from vllm.model_executor.models import commandr, gpt2, llama, mistral, qwen3_next, stablelm

    from peft_talan.serving.vllm.blocks import StreamPlace

    def place(block: type[nn.Module]) -> StreamPlace:
        return StreamPlace.of("layers.0", block.__new__(block))

    assert place(llama.LlamaDecoderLayer) == StreamPlace(("positions", "hidden_states", "residual"), True)
    assert place(mistral.MistralDecoderLayer).in_two_parts
    # Its residual is only what is left over.
    assert place(commandr.CohereDecoderLayer) == StreamPlace(("positions", "hidden_states", "residual"), False)
    assert place(stablelm.StablelmDecoderLayer) == StreamPlace(("positions", "hidden_states"), False)
    assert place(gpt2.GPT2Block) == StreamPlace(("hidden_states",), False)
    with pytest.raises(ValueError, match="forward has no argument 'hidden_states'"):
        place(nn.Linear)
    with pytest.raises(
        ValueError, match=r"not known whether Qwen3NextDecoderLayer\.forward adds .* with transformers"
    ):
        place(qwen3_next.Qwen3NextDecoderLayer)

    class LlamaDecoderLayer(llama.LlamaDecoderLayer):
        def forward(self, positions: object, hidden_states: object, residual: object) -> None:
            """Not vLLM's, whatever its name is."""

    with pytest.raises(ValueError, match="not known whether"):
        place(LlamaDecoderLayer)


def test_the_table_of_blocks_says_what_vllms_sources_say() -> None:
    """Whether a block reads its argument `residual` before it assigns to it."""
    import vllm.model_executor.models as models

    from peft_talan.serving.vllm.blocks import IN_ONE_PART, IN_TWO_PARTS

    listed = {**dict.fromkeys(IN_TWO_PARTS.split(), "Load"), **dict.fromkeys(IN_ONE_PART.split(), "Store")}
    found: dict[str, set[str]] = {name: set() for name in listed}
    for file in Path(models.__file__).parent.rglob("*.py"):
        if file.stem.endswith(("eagle", "eagle3")):
            continue  # drafts of speculative decoding, some of them with the names of other blocks
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name in listed:
                calls = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "forward"]
                found[node.name].update(first_use(call.body) for call in calls)
                found[node.name].discard("none")
    assert found == {name: {use} for name, use in listed.items()}


def first_use(body: list[ast.stmt]) -> str:
    """`Load` or `Store`: what comes first of `residual` where values are computed before they are assigned."""
    for statement in body:
        for node in walk_in_order(statement):
            if isinstance(node, ast.Name) and node.id == "residual":
                return type(node.ctx).__name__
    return "none"


def walk_in_order(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    parts = list(ast.iter_child_nodes(node))
    for part in reversed(parts) if isinstance(node, ast.Assign) else parts:
        yield from walk_in_order(part)


def test_a_part_of_the_stream_is_not_lost() -> None:
    from peft_talan.serving.vllm.blocks import StreamPlace

    place = StreamPlace(("positions", "hidden_states", "residual"), in_two_parts=True)
    first, second = torch.ones(3, 4), torch.full((3, 4), 2.0)
    for args, kwargs in (((0, first, second), {}), ((0,), {"hidden_states": first, "residual": second})):
        args, kwargs = place.change_input(lambda h: 10 * h, args, kwargs)
        assert not args
        assert kwargs["positions"] == 0
        assert torch.equal(kwargs["hidden_states"] + kwargs["residual"], torch.full((3, 4), 30.0))
    _, kwargs = place.change_input(lambda h: 10 * h, (0, first, None), {})
    assert torch.equal(kwargs["hidden_states"], 10 * first)
    assert kwargs["residual"] is None
    written, left = place.change_output(lambda h: 10 * h, (first, second))
    assert torch.equal(written + left, torch.full((3, 4), 30.0))
