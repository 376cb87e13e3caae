"""One model under test, and how its kind is called: with what inputs, and in which variant of them."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

TOKENS = 13
SMALLEST_TOKEN, TOKENS_DRAWN = 5, 55


class Subject:
    """A base model of a family and its inputs."""

    def __init__(self, base: PreTrainedModel, family: str) -> None:
        self.base = base
        self.family = family
        self.dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
        self.arguments = set(inspect.signature(base.forward).parameters)
        self.two_sided = "decoder_input_ids" in self.arguments
        generator = torch.Generator().manual_seed(2)
        self.ids, self.source = (
            torch.randint(SMALLEST_TOKEN, TOKENS_DRAWN, (2, TOKENS), generator=generator) for _ in range(2)
        )
        self.targets = _targets(base)
        # Where positions are not computed from the mask, they are passed.
        self.passes_positions = False

    def _sides(self, ids: torch.Tensor, rows: list[int] | None, mask: torch.Tensor | None) -> dict[str, Any]:
        """The tokens and their mask, which are the decoder's where the model has two sides."""
        prefix = "decoder_" if self.two_sided else ""
        inputs = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
        if self.two_sided:
            inputs["input_ids"] = self.source if rows is None else self.source[rows]
        return {name: value for name, value in inputs.items() if value is not None}

    def inputs(
        self,
        ids: torch.Tensor,
        rows: list[int] | None = None,
        mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments of a forward pass."""
        inputs = self._sides(ids, rows, mask)
        if position_ids is None and mask is not None and self.passes_positions:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        if position_ids is not None:
            inputs["position_ids"] = position_ids
            # With a cache, transformers does not look for samples in the positions.
            if mask is None and "use_cache" in self.arguments:
                inputs["use_cache"] = False
        for name, value in (("use_cache", False), ("attention_mask", torch.ones_like(ids))):
            if name in self.required:
                inputs.setdefault(name, value)
        return inputs

    @property
    def required(self) -> set[str]:
        """Arguments without a default."""
        parameters = inspect.signature(self.base.forward).parameters.values()
        return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}

    def logits(
        self, model: nn.Module, ids: torch.Tensor, rows: list[int] | None = None, **options: Any
    ) -> torch.Tensor:
        """The logits of a forward pass without gradients."""
        torch.manual_seed(0)
        with torch.no_grad():
            return _logits(model(**self.inputs(ids, rows, **options)))

    def generate(
        self,
        model: PeftModel,
        ids: torch.Tensor,
        new_tokens: int,
        rows: list[int] | None = None,
        mask: torch.Tensor | None = None,
    ) -> Any:
        """Generate greedily with a cache."""
        if mask is None and not self.two_sided:
            mask = torch.ones_like(ids)
        inputs = self._sides(ids, rows, mask)
        torch.manual_seed(0)
        return model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )

    def gradients(self, model: PeftModel, checkpointing: bool) -> dict[str, torch.Tensor | None]:
        """The gradients of everything that trains, after one training step's backward pass."""
        base = model.get_base_model()
        model.train()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            model.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            logits = _logits(model(**self.inputs(self.ids)))
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()).backward()
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            return {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}
        finally:
            if checkpointing:
                base.gradient_checkpointing_disable()
            model.zero_grad(set_to_none=True)
            model.eval()


def _targets(base: PreTrainedModel) -> list[str]:
    """The two kinds of linear layers that stand in most blocks: LoRA weights that run fast."""
    layers, others = [], set()
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            layers.append(name.split(".")[-1])
        else:
            others.add(name.split(".")[-1])  # Reformer has other modules of the same name, which PEFT refuses
    # PEFT refuses the last layer of state-space blocks and parts of fused experts; routers return more than a tensor.
    unfit = re.compile(r"out_proj|lm_head|router|gate|up_proj|down_proj|^[0-9]")
    return [name for name, _ in Counter(layers).most_common() if name not in others and not unfit.search(name)][:2]


def _logits(output: Any) -> torch.Tensor:
    for name in ("logits", "prediction_logits"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]
