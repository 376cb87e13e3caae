"""The files that a save leaves in a folder: what the next one must not find there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .card import CARD_NAME, remove_sections

MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model*.index*.json", "pytorch_model*")
OTHER_FILES = (
    "adapter_config.json",
    "adapter_model.*",
    "added_tokens.json",
    "chat_template.*",
    "merges.txt",
    "prompt_form.json",
    "right_answers.json",
    "special_tokens_map.json",
    "tokenizer*",
    "trainer_state.json",
    "training_args.bin",
    "vocab.*",
)


def model_files(folder: Path) -> list[str]:
    """The names of the files in a folder that a loader would take for a model."""
    return sorted(file.name for pattern in MODEL_FILES for file in folder.glob(pattern))


def remove_saved_files(folder: Path) -> None:
    """Remove the model, the adapter, the tokenizer and the card's section that an earlier save left in a folder.

    Loaders would read them beside what is saved next: an adapter's configuration beside a plain model, an index of
    shards beside a single file. What no save of PEFT, transformers or this package has written stays.

    Args:
        folder: The folder; those inside of it are left alone.
    """
    for pattern in (*MODEL_FILES, *OTHER_FILES):
        for file in folder.glob(pattern):
            if file.is_file():
                file.unlink()
    if (folder / CARD_NAME).is_file():
        remove_sections(folder / CARD_NAME)


@contextmanager
def replaced_at_success(folder: Path) -> Iterator[None]:
    """Let a block write a folder anew; if an error or Ctrl-C ends the block, the folder is what it was before.

    A kill leaves what it was in a folder of that name and a random ending.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as aside:
        earlier = Path(aside, folder.name)
        if folder.is_dir():
            folder.rename(earlier)
        try:
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            if earlier.is_dir():
                earlier.rename(folder)
            raise
