"""The numbers and names of adapters by which vLLM shares pages and slots: one for each content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

FIRST_VERSION = 2**30
"""Numbers of adapters from here on stand for contents; vLLM counts its own from 1, and has 31 bits."""

NEEDED_ADAPTERS = "needed_adapters"
"""What the scheduler adds to a step's `SchedulerOutput`: the numbers of the adapters that unfinished requests name."""


def content_of(folder: str) -> bytes:
    """Of all that an adapter's answers depend on."""
    found = hashlib.sha256()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        file = Path(folder, name)
        if file.is_file():
            found.update(name.encode())
            with file.open("rb") as opened:
                # Whole files would leave holes of their size in the heap, of which other tensors then take a part.
                for piece in iter(lambda: opened.read(2**20), b""):
                    found.update(piece)
    return found.digest()


def number_of(content: bytes) -> int:
    """The number that stands for a content."""
    return FIRST_VERSION + int.from_bytes(content[:4], "big") % FIRST_VERSION


def version_of(request: LoRARequest) -> LoRARequest:
    """Name an adapter so that requests share pages, and slots, only where its tensors are the same.

    A number stands for one content, as `AdapterReader` sees to. An adapter that is loaded in place has what is in its
    folder now, and the number follows from that: requests that run keep theirs, and vLLM reads it once.

    Args:
        request: What a request, or a call that loads an adapter, names.

    Returns:
        The same adapter with its number, which is also a part of its name.
    """
    number, path = request.lora_int_id, request.lora_path
    if request.load_inplace:
        path = get_adapter_absolute_path(path)
        number = number_of(content_of(path))
    return LoRARequest(
        lora_name=f"{request.lora_name}#{number}",
        lora_int_id=number,
        lora_path=path,
        base_model_name=request.base_model_name,
        is_3d_lora_weight=request.is_3d_lora_weight,
    )
