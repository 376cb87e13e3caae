"""What trainers would do wrong in silence with a side path is refused: rollouts by vLLM, half a checkpoint resumed."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.trainer_callback import (
    CallbackHandler,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from ..checkpoint.names import without_wrappers
from ..config import TalanConfig
from ..private_names import OURS
from .attachment import attached_side_paths
from .merge import MergingModel
from .trainability import frozen_tensors


def check_rollouts(arguments: TrainingArguments) -> None:
    """Refuse to train a side path on what vLLM generates without it."""
    if getattr(arguments, "use_vllm", False):
        raise ValueError(
            f"{type(arguments).__name__}(use_vllm=True): vLLM would be sent the LoRA weights of this TALAN adapter "
            "without its side path, and the training would be on another model's text; set use_vllm=False, or "
            "use_transformers_continuous_batching=True where the trainer has it, or use AsyncGRPOTrainer or "
            "AsyncDistillationTrainer, which send the whole adapter to `vllm serve --enable-lora`"
        )


class WholeAdapter(TrainerCallback):
    """Lets a trainer send vLLM the adapter as it is, or nothing: TRL's asynchronous trainers can merge it, too.

    Args:
        arguments: The trainer's.
    """

    def __init__(self, arguments: TrainingArguments) -> None:
        self.kind = type(arguments).__name__

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to merge the adapter from here on, and what vLLM does not know of: a strength of this process.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: The model.

        Raises:
            ValueError: The side path has another strength than the trained one.
        """
        for _, layer in attached_side_paths(kwargs["model"]):
            for adapter_name, strength in layer.talan_strength.items():
                if strength != 1.0:
                    raise ValueError(
                        f"{self.kind}: adapter {adapter_name!r} has the strength {strength} in this process, and "
                        "vLLM would generate with 1; call set_talan_strength(model, 1.0) before the training"
                    )
        self._refuse_merging(kwargs["model"], self.kind)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the adapter be merged again.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: The model.
        """
        self._refuse_merging(kwargs["model"], None)

    def _refuse_merging(self, model: nn.Module, kind: str | None) -> None:
        for module in model.modules():
            if isinstance(module, MergingModel):
                module.rollouts_of = kind


def _digest(model: nn.Module, adapter_name: str, scope: Any) -> str | None:
    """Tell the values that a trainability scope freezes from others; None where one process does not see them."""
    tensors = {without_wrappers(name): one for name, one in frozen_tensors(model, adapter_name, scope).items()}
    # DeepSpeed's stage 3 and FSDP1 leave pieces of no fixed shape.
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        tensor.is_meta or hasattr(tensor, "ds_id") for tensor in tensors.values()
    ):
        return None
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(name.encode())
        digest.update(whole.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


class FrozenHalf(TrainerCallback, ExportableState):
    """Keeps in a checkpoint's state which values did not train, and refuses to resume on others.

    Checkpoints of FSDP and DeepSpeed leave out what does not train, and loading them lets it be what it is.

    Args:
        digests: For each adapter with frozen parts the scope that froze them, and the digest of their values. Default
            None: filled in as a training starts.
    """

    def __init__(self, digests: dict[str, list[str]] | None = None) -> None:
        self.digests = {} if digests is None else digests

    def state(self) -> dict[str, Any]:
        """What is saved with a checkpoint.

        Returns:
            The arguments to make this object with.
        """
        return {"args": {"digests": self.digests}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare with the checkpoint that was loaded, if any, and note what this training freezes.

        Args:
            args: The trainer's arguments.
            state: The trainer's state; of the checkpoint, if a training is resumed.
            control: Not used.
            **kwargs: The model.

        Raises:
            ValueError: The model has other values where the checkpoint has none.
        """
        model: nn.Module = kwargs["model"]
        entries: Any = state.stateful_callbacks
        saved = entries.get(type(self).__name__, {}).get("args", {}).get("digests", {})
        for adapter_name, (scope, digest) in saved.items():
            if _digest(model, adapter_name, scope) not in (digest, None):
                raise ValueError(
                    f"resume_from_checkpoint: the checkpoint is of a training with talan_trainable={scope!r} and was "
                    f"saved in parts without what this froze, and adapter {adapter_name!r} has other values there; "
                    "make the model with PeftModel.from_pretrained(base_model, CHECKPOINT, is_trainable=True) and "
                    "resume from CHECKPOINT, or start with the adapter that the training started with"
                )
        self.digests = {}
        for adapter_name, config in getattr(model, "peft_config", {}).items():
            scope = getattr(config, "talan_trainable", "joint")
            digest = None if scope == "joint" else _digest(model, adapter_name, scope)
            if isinstance(config, TalanConfig) and digest is not None:
                self.digests[adapter_name] = [scope, digest]
        # Of a checkpoint without this entry Trainer could not save the next one.
        entries.setdefault(type(self).__name__, self.state())


def look_at_trainers() -> None:
    """Let every trainer of a model with side paths refuse what it would do wrong; a second call does nothing.

    The last event of a trainer's construction is the place: TRL's trainers start or call vLLM after that. A callback
    sees the same event, if it is given to each trainer; transformers has no public list of default callbacks.
    """
    on_init_end = CallbackHandler.on_init_end
    if hasattr(on_init_end, OURS):
        return

    @functools.wraps(on_init_end)
    def checked_on_init_end(
        self: CallbackHandler, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> Any:
        if isinstance(self.model, nn.Module) and any(attached_side_paths(self.model)):
            check_rollouts(args)
            self.add_callback(FrozenHalf())
            # TRL's asynchronous trainers have no option `use_vllm`: they have no other way to generate.
            if hasattr(args, "vllm_server_base_url") and not hasattr(args, "use_vllm"):
                self.add_callback(WholeAdapter(args))
        return on_init_end(self, args, state, control, **kwargs)

    setattr(checked_on_init_end, OURS, True)
    # mypy takes methods for final; a callback would have to be given to each trainer.
    CallbackHandler.on_init_end = checked_on_init_end  # type: ignore[method-assign]
