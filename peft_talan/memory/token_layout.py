"""What is known of a call's tokens: which are real, and which share a memory."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLayout(NamedTuple):
    """Which tokens of a call enter the memory, and which share one.

    Args:
        valid: [batch, tokens], bool; False marks padding. None: every token is real.
        segment_ids: [batch, tokens], int, not falling, where 0 continues what came before the call; None: all 0.
        attended_past: [batch, past], bool: which earlier tokens this call's mask lets through. None: not known.
        attended: [batch]: the number of real tokens up to the call's last one, by its mask. None: not known.
    """

    valid: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    attended_past: torch.Tensor | None = None
    attended: torch.Tensor | None = None

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout on a device.

        Args:
            device: The device.

        Returns:
            The layout; itself if all of it is there already.
        """
        if all(part is None or part.device == device for part in self):
            return self
        return TokenLayout(*(None if part is None else part.to(device) for part in self))
