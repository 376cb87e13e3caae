"""The model card of an adapter: one section in the README.md of the folder that it is saved to or pushed from."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME
from transformers.utils.hub import PushToHubMixin

from ..config import TalanConfig
from ..version import INSTALL
from .adapter_file import LOW_RANK_FIELDS, read_heads
from .merged_config import class_that_loads, merged_side_paths, merged_tensor
from .names import is_side_path_key

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")
SECTION = re.compile(r"<!-- peft_talan (?P<digest>[0-9a-f]{12}) -->\n(?P<text>.*?)\n<!-- /peft_talan -->", re.DOTALL)

TITLE = "# Model card"
GENERATED = (TITLE, "### Framework versions", "- PEFT ", "This is the model card of a 🤗 transformers model")
"""How the lines begin that PEFT, transformers and this module add to an empty card."""
HELP: dict[str, str] = {axis.name: axis.metadata.get("help", "") for axis in fields(TalanConfig)}
AUTO_CLASSES: dict[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


class _Part(NamedTuple):
    """What one section of a card is about: an adapter, or a side path that belongs to a merged model."""

    title: str
    config: Mapping[str, Any]
    axes: tuple[str, ...]
    counts: Mapping[str, int]


def _adapter(folder: Path) -> _Part | None:
    """The TALAN adapter in a folder."""
    file = folder / CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if config.get("peft_type") != "TALAN":
        return None
    weights, counts = folder / SAFETENSORS_WEIGHTS_NAME, {}
    if weights.exists():  # It may be a pickle.
        sizes = {name: head.numel for name, head in read_heads(weights).items()}
        side_path = sum(size for name, size in sizes.items() if is_side_path_key(name))
        counts = {"LoRA weights": sum(s for name, s in sizes.items() if ".lora_" in name) - side_path}
        counts["side path"] = side_path
    axes = tuple(name for name in HELP if name.startswith("talan_") and name != "talan_version")
    return _Part("TALAN adapter", config, (*axes, *LOW_RANK_FIELDS), counts)


def _merged(folder: Path) -> list[_Part]:
    """The side paths of the merged model in a folder."""
    file = folder / MODEL_CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    side_paths = merged_side_paths(config)
    files = folder.glob("*.safetensors") if side_paths else ()
    sizes = [(merged_tensor(name), head.numel) for one in files for name, head in read_heads(one).items()]
    model_class = class_that_loads(config)
    task_type = "CAUSAL_LM" if model_class == AUTO_CLASSES["CAUSAL_LM"] else None
    shared = {"model_class": model_class, "task_type": task_type}
    parts = []
    for one in side_paths:
        title = "TALAN side path" + (f" {one.number + 1}, `{one.adapter_name}`" if len(side_paths) > 1 else "")
        values = {**one.axes, "blocks": list(one.blocks), "talan_version": one.talan_version, **shared}
        count = sum(size for tensor, size in sizes if tensor is not None and tensor.number == one.number)
        parts.append(_Part(title, values, ("blocks", *one.axes), {"side path": count}))
    return parts


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


def _section(part: _Part, folder: Path, repo_id: str | None, subfolder: str | None) -> str:
    config = part.config
    merged = "model_class" in config
    card = ModelCard.from_template(
        ModelCardData(),
        str(TEMPLATE),
        heading=f"## {part.title}" if subfolder is None else f"## {part.title} `{subfolder}`",
        base=_base_model(config, repo_id),
        base_place=json.dumps(config.get("base_model_name_or_path") or "the/base-model"),
        merged=merged,
        auto_class=AUTO_CLASSES.get(str(config.get("task_type")), config.get("model_class", "AutoModel")),
        place=json.dumps(repo_id or "path/to/this/folder"),
        subfolder=subfolder and json.dumps(subfolder),
        install=INSTALL,
        counts=part.counts,
        axes=[(name, json.dumps(config.get(name)).replace("|", "\\|"), HELP.get(name, "")) for name in part.axes],
        training=_training(folder),
        versions={
            "peft_talan": config.get("talan_version"),
            "PEFT": peft.__version__ if merged else config.get("peft_version"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    )
    return str(card.text.strip("\n"))


def _is_from_a_template(text: str) -> bool:
    """Whether a card's text is what PEFT or transformers fill in for a card that nobody wrote."""
    template = ModelCard.from_template(ModelCardData()).text

    def written(lines: str) -> list[str]:
        return [line.strip() for line in lines.splitlines() if line.strip() and not line.startswith(GENERATED)]

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


def remove_sections(file: Path) -> None:
    """Take the sections that nobody has edited out of a card, and the file away if only a template's text is left."""
    text = file.read_text(encoding="utf-8")
    left = SECTION.sub(lambda found: "" if _digest(found["text"]) == found["digest"] else found[0], text)
    if left == text:
        return
    body = ModelCard(left, ignore_metadata_errors=True).text
    rest = [line for line in body.splitlines() if line.strip() and not line.startswith(GENERATED)]
    if rest:
        file.write_text(left, encoding="utf-8")
    else:
        file.unlink()


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
        ValueError: The folder has neither a TALAN adapter nor a merged model with a side path.

    Examples:
        >>> model.save_pretrained("adapter")  # writes the card, too
        >>> trainer.create_model_card()  # puts another text in its place
        >>> write_card("adapter")  # adds the section again
    """
    folder = Path(folder)
    adapter = _adapter(folder)
    parts = _merged(folder) if adapter is None else [adapter]
    if not parts:
        raise ValueError(
            f"folder={str(folder)!r}: expected a saved TALAN adapter or a merged model with a side path, but neither "
            f"{CONFIG_NAME} nor {MODEL_CONFIG_NAME} names one"
        )
    place = folder if card_folder is None else Path(card_folder)
    subfolder = None if card_folder is None else folder.relative_to(place).as_posix()
    file = place / CARD_NAME
    try:
        card = ModelCard.load(file) if file.exists() else ModelCard.from_template(ModelCardData())
    except (ValueError, yaml.YAMLError) as error:
        warnings.warn(f"{file} was left as it is: its metadata can't be read ({error})", stacklevel=2)
        return
    framework = None
    if _is_from_a_template(card.text):
        card.data.library_name = "transformers" if adapter is None else "peft"
        framework = re.search(r"### Framework versions\n\n- PEFT .*", card.text)
        card.text = f"\n{TITLE}\n"
    for part in parts:
        card.text = _put_section(card.text, _section(part, folder, repo_id, subfolder))
    if framework is not None:
        card.text += f"\n{framework[0]}\n"
    config = parts[0].config
    base, relation = (merged_into, "finetune") if adapter is None else (_base_model(config, repo_id), "adapter")
    _set_metadata(card.data, config, base, relation)
    card.save(file)


def write_adapter_card(adapter_name: str, folder: str | PathLike[str]) -> None:
    """Write the card of an adapter that PEFT has just saved: in the folder that holds it and its model's others."""
    folder = Path(folder)
    in_subfolder = adapter_name != "default" and folder.name == adapter_name
    write_card(folder, card_folder=folder.parent if in_subfolder else None)


def write_cards(model: Any, folder: str | PathLike[str], repo_id: str | None = None) -> None:
    """Write the card of a folder that a model was saved to, if the model has TALAN adapters or merged side paths."""
    names = [name for name, config in getattr(model, "peft_config", {}).items() if isinstance(config, TalanConfig)]
    folder = Path(folder)
    if names and _adapter(folder) is not None:
        write_card(folder, repo_id)
    elif isinstance(model, PreTrainedModel) and _merged(folder):
        base = model.name_or_path
        write_card(folder, repo_id, merged_into=None if not base or base == repo_id or Path(base).exists() else base)
    for name in names:
        if _adapter(folder / name) is not None:
            write_card(folder / name, repo_id, card_folder=folder)


def write_cards_on_push() -> None:
    """Extend the upload of a model or an adapter: `push_to_hub` has put the repository's card over the saved one.

    transformers offers no hook there. It does nothing more than before for a model without a TALAN side path. All else
    needs no extension: PEFT's save ends with the adapter's configuration, which writes the section.
    """
    upload = PushToHubMixin._upload_modified_files

    @wraps(upload)
    def upload_modified_files(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        write_cards(self, working_dir, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    PushToHubMixin._upload_modified_files = upload_modified_files  # type: ignore[method-assign, assignment]
