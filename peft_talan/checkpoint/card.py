"""The model card of an adapter: one section in the README.md of the folder that it is saved to or pushed from."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import wraps
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft.peft_model import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME
from transformers.utils.hub import PushToHubMixin

from ..config import TalanConfig
from ..version import INSTALL
from .adapter_file import LOW_RANK_FIELDS, read_heads
from .names import is_side_path_key

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")
SECTION = re.compile(r"<!-- peft_talan (?P<digest>[0-9a-f]{12}) -->\n(?P<text>.*?)\n<!-- /peft_talan -->", re.DOTALL)

AUTO_CLASSES: dict[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def _adapter_config(folder: Path) -> dict[str, Any] | None:
    """The fields of the TALAN adapter in a folder; None if there is none."""
    file = folder / CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return config if config.get("peft_type") == "TALAN" else None


def _count_halves(folder: Path) -> dict[str, int]:
    """The numbers of both halves; empty if the adapter was saved as a pickle."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        return {}
    sizes = {name: head.numel for name, head in read_heads(file).items()}
    return {
        "low-rank half": sum(size for name, size in sizes.items() if ".lora_" in name and not is_side_path_key(name)),
        "side path": sum(size for name, size in sizes.items() if is_side_path_key(name)),
    }


def _training(folder: Path) -> dict[str, Any]:
    """What Trainer wrote beside the adapter, if it did."""
    file = folder / "trainer_state.json"
    if not file.exists():
        return {}
    state = json.loads(file.read_text(encoding="utf-8"))
    rows = {"steps": state.get("global_step"), "epochs": state.get("epoch")}
    for name in ("loss", "eval_loss"):
        values = [entry[name] for entry in state.get("log_history", []) if name in entry]
        if values:
            rows[f"last {name}"] = f"{values[-1]:.6g}"
    return {name: value for name, value in rows.items() if value is not None}


def _base_model(config: Mapping[str, Any], repo_id: str | None) -> str | None:
    """The base model's name on the hub; None if it is a folder, or if the weights lie beside the adapter."""
    name: str | None = config.get("base_model_name_or_path")
    return None if not name or name == repo_id or Path(name).exists() else name


def _section(config: Mapping[str, Any], folder: Path, repo_id: str | None, subfolder: str | None) -> str:
    help_of = {axis.name: axis.metadata.get("help", "") for axis in fields(TalanConfig)}
    axes = [name for name in help_of if name.startswith("talan_") and name != "talan_version"]
    rows = [(name, config.get(name), help_of[name]) for name in axes]
    rows += [(name, config.get(name), "") for name in LOW_RANK_FIELDS]
    card = ModelCard.from_template(
        ModelCardData(),
        str(TEMPLATE),
        heading="## TALAN adapter" if subfolder is None else f"## TALAN adapter `{subfolder}`",
        base=_base_model(config, repo_id),
        base_place=json.dumps(config.get("base_model_name_or_path") or "the/base-model"),
        embedded=(folder / MODEL_CONFIG_NAME).exists(),
        auto_class=AUTO_CLASSES.get(str(config.get("task_type") or ""), "AutoModel"),
        place=json.dumps(repo_id or "path/to/this/folder"),
        subfolder=subfolder and json.dumps(subfolder),
        install=INSTALL,
        counts=_count_halves(folder),
        axes=[(name, json.dumps(value).replace("|", "\\|"), meaning) for name, value, meaning in rows],
        training=_training(folder),
        versions={
            "peft_talan": config.get("talan_version"),
            "PEFT": config.get("peft_version"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    )
    return str(card.text.strip("\n"))


def _is_from_a_template(text: str) -> bool:
    """Whether a card's text is what PEFT or transformers fill in for a card that nobody wrote."""
    template = ModelCard.from_template(ModelCardData()).text

    def written(lines: str) -> list[str]:
        added = ("### Framework versions", "- PEFT ", "This is the model card of a 🤗 transformers model")
        return [line.strip() for line in lines.splitlines() if line.strip() and not line.startswith(added)]

    return written(text) == written(template)


def _put_section(text: str, section: str) -> str:
    """Replace the earlier section of the same heading, unless it was changed by hand, or add it at the end."""
    heading = section.splitlines()[1]
    block = f"<!-- peft_talan {_digest(section)} -->\n{section}\n<!-- /peft_talan -->"
    for earlier in SECTION.finditer(text):
        if heading in earlier["text"].splitlines():
            if _digest(earlier["text"]) != earlier["digest"]:
                return f"{text.rstrip()}\n"
            return f"{text[: earlier.start()]}{block}{text[earlier.end() :].rstrip()}\n"
    return f"{text.rstrip()}\n\n{block}\n"


def _digest(section: str) -> str:
    return hashlib.sha256(section.encode()).hexdigest()[:12]


def _set_metadata(data: ModelCardData, config: Mapping[str, Any], base: str | None, relation: str) -> None:
    name = config.get("base_model_name_or_path")
    if name and Path(name).exists():
        # A folder of this machine: no reader has it, and the hub refuses it as a base model.
        data.base_model = None if data.base_model == name else data.base_model
        data.tags = [tag for tag in data.tags or [] if tag != f"base_model:adapter:{name}"]
    tags = ["peft", "talan"]
    if base is not None:
        data.base_model = data.base_model or base
        if data.get("base_model_relation") is None:
            data["base_model_relation"] = relation
        tags.append(f"base_model:{relation}:{base}")
    data.tags = [*(data.tags or []), *(tag for tag in tags if tag not in (data.tags or []))]
    if config.get("task_type") == "CAUSAL_LM" and not data.pipeline_tag:
        data.pipeline_tag = "text-generation"


def write_card(
    folder: str | PathLike[str],
    repo_id: str | None = None,
    card_folder: str | PathLike[str] | None = None,
    merged_into: str | None = None,
) -> None:
    """Add what a reader needs to a saved adapter's model card; nothing that somebody wrote is changed.

    A card that PEFT or transformers filled in from a template is replaced. In any other, one section is added at the
    end, and renewed by the next save as long as nobody has edited it.

    Args:
        folder: The folder of the adapter, as PEFT or transformers saved it.
        repo_id: The repository on the hub that the folder goes to, if it is known. Default None.
        card_folder: The folder of the card, if the adapter lies in a subfolder of it. Default: `folder`.
        merged_into: The model whose merged weights lie beside the side path, if it is known. Default None.

    Raises:
        ValueError: The folder has no TALAN adapter.

    Examples:
        >>> model.save_pretrained("adapter")  # writes the card, too
        >>> trainer.create_model_card()  # TRL's puts another text in its place
        >>> write_card("adapter")  # adds the section again
    """
    folder = Path(folder)
    config = _adapter_config(folder)
    if config is None:
        raise ValueError(f"folder={str(folder)!r}: expected a saved TALAN adapter, but {CONFIG_NAME} names none")
    place = folder if card_folder is None else Path(card_folder)
    subfolder = None if card_folder is None else folder.relative_to(place).as_posix()
    file = place / CARD_NAME
    try:
        card = ModelCard.load(file) if file.exists() else ModelCard.from_template(ModelCardData())
    except (ValueError, yaml.YAMLError) as error:
        warnings.warn(f"{file} was left as it is: its metadata can't be read ({error})", stacklevel=2)
        return
    embedded = (folder / MODEL_CONFIG_NAME).exists()
    framework = None
    if _is_from_a_template(card.text):
        card.data.library_name = "transformers" if embedded else "peft"
        framework = re.search(r"### Framework versions\n\n- PEFT .*", card.text)
        card.text = "\n# Model card\n"
    card.text = _put_section(card.text, _section(config, folder, repo_id, subfolder))
    if framework is not None:
        card.text += f"\n{framework[0]}\n"
    base, relation = (merged_into, "finetune") if embedded else (_base_model(config, repo_id), "adapter")
    _set_metadata(card.data, config, base, relation)
    card.save(file)


def write_cards(model: Any, folder: str | PathLike[str], repo_id: str | None = None) -> None:
    """Write the card of a folder that a model was saved to, if the model has TALAN adapters.

    Args:
        model: The model; only the folder is read, its adapters' names tell which subfolders belong to it.
        folder: The folder.
        repo_id: The repository on the hub that the folder goes to, if it is known. Default None.
    """
    names = [name for name, config in getattr(model, "peft_config", {}).items() if isinstance(config, TalanConfig)]
    folder = Path(folder)
    config = _adapter_config(folder)
    if config is not None and (names or config.get("talan_kept")):
        base = getattr(model, "name_or_path", None)
        merged_into = None if not base or base == repo_id or Path(base).exists() else base
        write_card(folder, repo_id, merged_into=merged_into)
    for name in names:
        if _adapter_config(folder / name) is not None:
            write_card(folder / name, repo_id, card_folder=folder)


def write_cards_on_save() -> None:
    """Extend the methods of PEFT and transformers that write or upload a model card, so that they call `write_cards`.

    Neither library has a hook for a tuner's card. `push_to_hub` writes the repository's card, or a template, over the
    one that `save_pretrained` left, and Trainer's `create_model_card` writes its own: so all three are extended. They
    keep no state, and do nothing more than before for a model without a TALAN adapter.
    """
    save, update, upload = (
        PeftModel.save_pretrained,
        PeftModel.create_or_update_model_card,
        PushToHubMixin._upload_modified_files,
    )

    @wraps(save)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
        save(self, save_directory, *args, **kwargs)
        if signature(save).bind(self, save_directory, *args, **kwargs).arguments.get("is_main_process", True):
            write_cards(self, save_directory)

    @wraps(update)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        file = Path(output_dir) / CARD_NAME
        # PEFT sets the tags anew, which would lose those of the section and the user's.
        tags = ModelCard.load(file).data.tags or [] if file.exists() else []
        update(self, output_dir)
        if any(isinstance(config, TalanConfig) for config in self.peft_config.values()):
            card = ModelCard.load(file)
            card.data.tags = [*tags, *(tag for tag in card.data.tags or [] if tag not in tags)]
            card.save(file)
            write_cards(self, output_dir)

    @wraps(upload)
    def upload_modified_files(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        write_cards(self, working_dir, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    for owner, method in (
        (PeftModel, save_pretrained),
        (PeftModel, create_or_update_model_card),
        (PushToHubMixin, upload_modified_files),
    ):
        setattr(owner, method.__name__, method)
