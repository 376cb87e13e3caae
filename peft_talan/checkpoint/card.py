"""The model card of an adapter, written beside what PEFT and transformers save and push."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME
from transformers.utils.hub import PushToHubMixin

from .names import is_side_path_key

CARD_NAME = "README.md"
SECTION = re.compile(r"<!-- peft_talan (?P<digest>[0-9a-f]{12}) -->\n(?P<text>.*?)\n<!-- /peft_talan -->", re.DOTALL)
SECTION_NOTE = "<!-- Written by peft_talan. Once you have changed it, it is yours and stays as it is. -->"

AUTO_CLASSES: dict[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
LOW_RANK_FIELDS: tuple[str, ...] = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


@dataclass(frozen=True)
class SavedHalves:
    """What a model that is being saved tells its adapter's configuration, which PEFT and transformers save with it.

    Args:
        counts: The numbers of both halves.
        in_subfolder: Whether the adapter goes into a subfolder of the folder that has the card.
    """

    counts: Mapping[str, int]
    in_subfolder: bool


def count_halves(names: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Add up the numbers of each half of an adapter.

    Args:
        names: The names and sizes of its tensors.

    Returns:
        The numbers by half.
    """
    counts = {"low-rank half": 0, "side path": 0}
    for name, size in names:
        if is_side_path_key(name):
            counts["side path"] += size
        elif ".lora_" in name:
            counts["low-rank half"] += size
    return counts


def _count_saved(folder: Path) -> dict[str, int] | None:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as tensors:
        shapes = [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118 - no dict
    return count_halves((name, torch.Size(shape).numel()) for name, shape in shapes)


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _show(value: object) -> str:
    value = sorted(value) if isinstance(value, set) else value
    return f"`{json.dumps(value, default=str)}`"


def _base_model(config: PeftConfig, repo_id: str | None) -> str | None:
    """The base model's name on the hub; None where it is a folder, or where the weights lie beside the adapter."""
    name = config.base_model_name_or_path
    return None if not name or name == repo_id or Path(name).exists() else name


def _usage(config: PeftConfig, folder: Path, repo_id: str | None, subfolder: str | None) -> list[str]:
    place = repr(repo_id or "path/to/this/folder").replace("'", '"')
    auto_class = AUTO_CLASSES.get(str(config.task_type or ""), "AutoModel")
    if (folder / MODEL_CONFIG_NAME).exists():
        # Merged weights and an embedded side path.
        return [f"from transformers import {auto_class}", "", f"model = {auto_class}.from_pretrained({place})"]
    base = json.dumps(config.base_model_name_or_path or "the/base-model")
    where = place if subfolder is None else f"{place}, subfolder={json.dumps(subfolder)}"
    return [
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f"base_model = {auto_class}.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(base_model, {where})",
    ]


def _training(folder: Path) -> list[str]:
    """What Trainer wrote beside the adapter, if it did."""
    file = folder / "trainer_state.json"
    if not file.exists():
        return []
    state = json.loads(file.read_text(encoding="utf-8"))
    rows = [("steps", state.get("global_step")), ("epochs", state.get("epoch"))]
    for name in ("loss", "eval_loss"):
        values = [entry[name] for entry in state.get("log_history", []) if name in entry]
        if values:
            rows.append((f"last {name}", f"{values[-1]:.6g}"))
    known = [row for row in rows if row[1] is not None]
    return ["", "### Training", "", *_table(("", "value"), known)] if known else []


def _section(
    config: PeftConfig, folder: Path, counts: Mapping[str, int] | None, repo_id: str | None, subfolder: str | None
) -> str:
    base = _base_model(config, repo_id)
    heading = "## TALAN adapter" if subfolder is None else f"## TALAN adapter `{subfolder}`"
    axes = [axis for axis in fields(config) if axis.name.startswith("talan_") and axis.name != "talan_version"]
    low_rank = [(f"`{name}`", _show(getattr(config, name)), "") for name in LOW_RANK_FIELDS]
    lines = [
        SECTION_NOTE,
        heading,
        "",
        "A low-rank adapter and a sequence-conditioned latent side path in the residual stream "
        "([TALAN, arXiv 2606.06902](https://arxiv.org/abs/2606.06902)), trained together"
        + (f" on [{base}](https://huggingface.co/{base})." if base else "."),
        "",
        "```sh",
        "pip install peft-talan",
        "```",
        "",
        "```python",
        *_usage(config, folder, repo_id, subfolder),
        "```",
        "",
        "With the package installed, programs that load PEFT adapters load this one; none has to import it.",
    ]
    if counts:
        lines += ["", "### Parameters", "", *_table(("half", "numbers"), [(n, f"{c:,}") for n, c in counts.items()])]
    described = [(f"`{axis.name}`", _show(getattr(config, axis.name)), axis.metadata.get("help", "")) for axis in axes]
    lines += ["", "### Axes", "", *_table(("field", "value", "meaning"), [*described, *low_rank])]
    lines += _training(folder)
    versions = {
        "peft_talan": getattr(config, "talan_version", None),
        "PEFT": config.peft_version,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    lines += ["", "### Made with", "", *(f"- {name} {version}" for name, version in versions.items())]
    return "\n".join(lines)


def _is_from_a_template(text: str) -> bool:
    """Whether a card's text is what PEFT or transformers fill in for a card that nobody wrote."""
    template = ModelCard.from_template(ModelCardData()).text

    def written(lines: str) -> list[str]:
        added = ("### Framework versions", "- PEFT ", "This is the model card of a 🤗 transformers model")
        return [line.strip() for line in lines.splitlines() if line.strip() and not line.startswith(added)]

    return written(text) == written(template)


def _put_section(text: str, section: str, heading: str) -> str:
    """Replace the earlier section of the same heading, unless it was changed by hand, or add it at the end."""
    digest = hashlib.sha256(section.encode()).hexdigest()[:12]
    block = f"<!-- peft_talan {digest} -->\n{section}\n<!-- /peft_talan -->"
    for found in SECTION.finditer(text):
        if heading in found["text"].splitlines():
            if hashlib.sha256(found["text"].encode()).hexdigest()[:12] != found["digest"]:
                return f"{text.rstrip()}\n"
            return f"{text[: found.start()]}{block}{text[found.end() :].rstrip()}\n"
    return f"{text.rstrip()}\n\n{block}\n"


def _drop_local_base(data: ModelCardData, config: PeftConfig) -> None:
    """Take out a base model that is a folder of this machine: no reader has it, and the hub refuses it."""
    name = config.base_model_name_or_path
    if name and Path(name).exists():
        data.base_model = None if data.base_model == name else data.base_model
        data.tags = [tag for tag in data.tags or [] if tag != f"base_model:adapter:{name}"]


def write_card(
    folder: str | PathLike[str],
    config: PeftConfig | None = None,
    counts: Mapping[str, int] | None = None,
    repo_id: str | None = None,
    card_folder: str | PathLike[str] | None = None,
    merged_into: str | None = None,
) -> None:
    """Add what a reader needs to a saved adapter's model card; nothing that somebody wrote is changed.

    A card that PEFT or transformers filled in from a template is replaced. In any other, one section is added at the
    end, and renewed by the next save as long as nobody has edited it.

    Args:
        folder: The folder of the adapter.
        config: Its configuration; None: it is read from the folder. Default None.
        counts: The numbers of both halves; None: they are read from the folder's safetensors file. Default None.
        repo_id: The repository on the hub that the folder goes to, if it is known. Default None.
        card_folder: The folder of the card, where the adapter lies in a subfolder of it. Default: `folder`.
        merged_into: The model whose merged weights lie beside the side path, if it is known. Default None.
    """
    folder = Path(folder)
    place = folder if card_folder is None else Path(card_folder)
    subfolder = None if card_folder is None else folder.relative_to(place).as_posix()
    config = PeftConfig.from_pretrained(str(folder)) if config is None else config
    counts = _count_saved(folder) if counts is None else counts
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
    section = _section(config, folder, counts, repo_id, subfolder)
    card.text = _put_section(card.text, section, section.splitlines()[1])
    if framework is not None:
        card.text += f"\n{framework[0]}\n"
    base, relation = _base_model(config, repo_id), "adapter"
    if embedded:
        base, relation = merged_into, "finetune"
    tags = ["peft", "talan"]
    _drop_local_base(card.data, config)
    if base is not None:
        card.data.base_model = card.data.base_model or base
        if card.data.get("base_model_relation") is None:
            card.data["base_model_relation"] = relation
        tags.append(f"base_model:{relation}:{base}")
    card.data.tags = [*(card.data.tags or []), *(tag for tag in tags if tag not in (card.data.tags or []))]
    if str(config.task_type or "") == "CAUSAL_LM" and not card.data.pipeline_tag:
        card.data.pipeline_tag = "text-generation"
    card.save(file)


def _upload_with_card(model: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    if (Path(working_dir) / CONFIG_NAME).exists():
        name = getattr(model, "name_or_path", None)
        merged_into = None if not name or name == repo_id or Path(name).exists() else name
        write_card(working_dir, repo_id=repo_id, merged_into=merged_into)
    for file in sorted(Path(working_dir).glob(f"*/{CONFIG_NAME}")):
        write_card(file.parent, repo_id=repo_id, card_folder=working_dir)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _update_with_section(model: Any, output_dir: str) -> None:
    file = Path(output_dir) / CARD_NAME
    tags = ModelCard.load(file).data.tags or [] if file.exists() else []
    type(model).create_or_update_model_card(model, output_dir)
    card = ModelCard.load(file)
    card.data.tags = [*tags, *(tag for tag in card.data.tags or [] if tag not in tags)]
    card.save(file)
    if (Path(output_dir) / CONFIG_NAME).exists():
        write_card(output_dir)


def announce_save(model: nn.Module, config: Any, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Prepare the model card while an adapter's tensors are collected to be saved.

    `push_to_hub` puts the repository's card, or a template, over what `save_pretrained` wrote, and Trainer's
    `create_model_card` rewrites the card that it finds. Both then call a method of the model, which is put in their
    way on this one model: PEFT's class stays what it is.

    Args:
        model: PEFT's wrapper, or transformers' model with an adapter in it.
        config: The adapter's `TalanConfig`; it writes the card when it is saved itself.
        adapter_name: The adapter's name.
        tensors: The adapter's tensors.
    """
    wrapped = hasattr(type(model), "create_or_update_model_card")
    counts = count_halves((name, tensor.numel()) for name, tensor in tensors.items())
    config.saved_halves = SavedHalves(counts, in_subfolder=wrapped and adapter_name != "default")
    # Partials, since bound methods do not survive pickling.
    if isinstance(model, PushToHubMixin):
        vars(model)["_upload_modified_files"] = partial(_upload_with_card, model)
    if wrapped:
        vars(model)["create_or_update_model_card"] = partial(_update_with_section, model)
