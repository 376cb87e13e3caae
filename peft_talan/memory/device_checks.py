"""Refuses what a tensor says without waiting for its device."""

from __future__ import annotations

import torch


def refuse_unless(condition: bool | torch.Tensor, message: str) -> None:
    """Raise an error if a condition does not hold.

    A condition on an accelerator is not read by the host, which would have to wait for it: the device checks it and
    stops the program with an assertion, as it does for an index out of range.
    """
    if not isinstance(condition, torch.Tensor):
        if not condition:
            raise ValueError(message)
        return
    if condition.numel() != 1:
        condition = condition.all()
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        torch._assert_async(condition, message)
    else:
        try:
            torch._assert_async(condition, message)
        except RuntimeError as error:
            raise ValueError(message) from error
