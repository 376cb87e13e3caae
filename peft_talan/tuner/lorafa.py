"""Lets PEFT's LoRA-FA optimizer train an adapter that has a side path."""

from __future__ import annotations

import functools
from typing import Any

from peft.optimizers.lorafa import LoraFAOptimizer

from ..checkpoint.names import is_side_path_key
from ..private_names import OURS


def let_lorafa_train_side_paths() -> None:
    """Let LoRA-FA take a side path's tensors as it takes all but LoRA's: by AdamW; a second call does nothing.

    It pairs the tensors with `lora` in their names, A before B, which is the names' only use. PEFT has no hook there.
    """
    create = LoraFAOptimizer.__init__
    if hasattr(create, OURS):
        return

    @functools.wraps(create)
    def create_with_side_paths(self: LoraFAOptimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        groups = list(params)
        for group in groups:
            if isinstance(group, dict) and "names" in group:
                names = enumerate(group["names"])
                group["names"] = [f"side path {i}" if is_side_path_key(name) else name for i, name in names]
        create(self, groups, *args, **kwargs)

    setattr(create_with_side_paths, OURS, True)
    LoraFAOptimizer.__init__ = create_with_side_paths  # type: ignore[method-assign]
