"""Models are traced and cut into pieces, as on GPUs: on processors vLLM cuts none, and traces none with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def compile_in_pieces() -> None:
    """Let all engines of this process do so; the pieces run as they are traced, without a compiler of kernels."""
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import EngineArgs

    configure = EngineArgs.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = configure(self, *args, **kwargs)
        compilation = config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "eager"
        compilation.splitting_ops, compilation.compile_sizes = None, []
        compilation.set_splitting_ops_for_v1(config.parallel_config.all2all_backend)
        return config

    EngineArgs.create_engine_config = create_engine_config
    _hide_lora_weights()


def _hide_lora_weights() -> None:
    """Put vLLM's LoRA weights for processors, which can't be traced, behind an operator, as those for GPUs are."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrapper = PunicaWrapperCPU
    start, linear, embedding = wrapper.__init__, wrapper.add_lora_linear, wrapper.add_lora_embedding
    newest: list[Any] = []

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        newest[:] = [self]

    def run_linear(y: Any, x: Any, a: Sequence[Any], b: Sequence[Any], scale: float, sizes: Sequence[int]) -> None:
        linear(newest[0], y, x, tuple(a), tuple(b), scale, tuple(sizes))

    def run_embedding(y: Any, x: Any, b: Any, add: bool) -> None:
        embedding(newest[0], y, x, b, add)

    of_linear, of_embedding = (
        torch.library.custom_op(f"tests::{run.__name__}", run, mutates_args=["y"], schema=schema)
        for run, schema in (
            (run_linear, "(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, float scale, int[] sizes) -> ()"),
            (run_embedding, "(Tensor(a!) y, Tensor x, Tensor b, bool add) -> ()"),
        )
    )

    def add_lora_linear(_: Any, y: Any, x: Any, a: Any, b: Any, scale: float, sizes: Any, **__: Any) -> None:
        of_linear(y, x, list(a), list(b), float(scale), list(sizes))

    def add_lora_embedding(_: Any, y: Any, x: Any, b: Any, add_inputs: bool = True, **__: Any) -> None:
        of_embedding(y, x, b, add_inputs)

    wrapper.__init__, wrapper.add_lora_linear = init, add_lora_linear
    wrapper.add_lora_embedding = add_lora_embedding
