"""The numbers and names of adapters by which vLLM shares pages and slots: one for each content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import copy
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

FIRST_VERSION = 2**30
"""Numbers of adapters from here on stand for contents; vLLM counts its own from 1, and has 31 bits."""

NEEDED_ADAPTERS = "needed_adapters"
"""What the scheduler adds to a step's `SchedulerOutput`: the numbers of the adapters that workers must not lose."""


def files_of(folder: str) -> list[Path]:
    """The files of an adapter on which its answers depend, those of them that are there."""
    names = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    return [file for file in (Path(folder, name) for name in names) if file.is_file()]


def content_of(folder: str) -> bytes:
    """Of all that an adapter's answers depend on."""
    found = hashlib.sha256()
    for file in files_of(folder):
        found.update(file.name.encode())
        with file.open("rb") as opened:
            # Whole files would leave holes of their size in the heap, of which other tensors then take a part.
            for piece in iter(lambda: opened.read(2**20), b""):
                found.update(piece)
    return found.digest()


def number_of(content: bytes) -> int:
    """The number that stands for a content."""
    return FIRST_VERSION + int.from_bytes(content[:4], "big") % FIRST_VERSION


class _Seen(NamedTuple):
    """An adapter that a request has loaded in place, and what tells whether its files have changed since."""

    version: LoRARequest
    files: list[tuple[int, ...]]


class AdapterVersions:
    """Knows, in one engine, what the adapters that were loaded in place held then.

    Args:
        kept: How many of them workers keep, those that were loaded last: their files may hold something else by now.
    """

    def __init__(self, kept: int) -> None:
        self.kept: list[int] = []
        self._room = kept
        self._loaded: dict[tuple[str, int, str], LoRARequest] = {}
        self._seen: dict[tuple[str, int, str], _Seen] = {}

    def load(self, request: LoRARequest, load: Callable[[LoRARequest], bool]) -> bool:
        """Load an adapter; where it is loaded in place, requests that name it mean what its files hold now.

        Args:
            request: What names the adapter.
            load: Loads it; where it raises, requests mean what they meant before.

        Returns:
            What `load` returns.
        """
        key = _key(request)
        version = as_it_is(request) if request.load_inplace else request
        loaded = load(version)
        self._loaded.pop(key, None)
        if request.load_inplace:
            self._loaded[key] = version
        self.kept = [one.lora_int_id for one in islice(reversed(self._loaded.values()), self._room)]
        return loaded

    def named_by(self, request: LoRARequest) -> LoRARequest:
        """Name an adapter so that requests share pages, and slots, only where its tensors are the same.

        A number stands for one content, as `AdapterReader` sees to. What a call has loaded in place stays until the
        next call, since its files may be half written by then. Where there was no call, a request with `load_inplace`
        loads what its files hold now; they are read where they have changed.

        Args:
            request: What names the adapter.

        Returns:
            The same adapter with its number, which is also a part of its name.
        """
        key = _key(request)
        version = self._loaded.get(key, request)
        if version.load_inplace:
            seen = self._seen.get(key)
            if seen is None or seen.files != _files_of(seen.version.lora_path):
                # What changes between the two is read again for the next request.
                files = _files_of(get_adapter_absolute_path(request.lora_path))
                seen = self._seen[key] = _Seen(as_it_is(request), files)
            version = seen.version
        named = copy(version)
        named.lora_name = f"{request.lora_name}#{version.lora_int_id}"
        return named


def as_it_is(request: LoRARequest) -> LoRARequest:
    """The adapter in its folder, under the number of what that holds now if it is to be loaded in place."""
    found = copy(request)
    found.lora_path = get_adapter_absolute_path(request.lora_path)
    if request.load_inplace:
        found.lora_int_id, found.load_inplace = number_of(content_of(found.lora_path)), False
    return found


def _key(request: LoRARequest) -> tuple[str, int, str]:
    """What tells one adapter from another where requests name them."""
    return request.lora_name, request.lora_int_id, request.lora_path


def _files_of(folder: str) -> list[tuple[int, ...]]:
    """What changes, in next to no time, where one of an adapter's files is written."""
    found = [file.stat() for file in files_of(folder)]
    return [(one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in found]
