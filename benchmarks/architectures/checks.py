"""The checks that an adapter must pass on a model: each returns a difference that is zero where all is right.

Differences are the largest one over the largest logit. A check is run on plain LoRA first, and says nothing about the
side path where LoRA itself fails.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from .subject import Subject
from .tiny import DECODER_START

NEW_TOKENS = 3
CHANGED = 4
PADDING = 4
FLOOR = 2e-5
"""Differences up to here are rounding: many models normalize in float32, whatever the dtype of their weights."""
LARGEST_ROUNDING = 1e-3
"""LoRA is right up to here: recurrences in float32 round more."""


class Check(NamedTuple):
    """A check, which takes the model with its adapter and the subject and returns the difference."""

    run: Callable[[PeftModel, Subject], float]
    exact: bool = False
    families: tuple[str, ...] = ("causal", "image-text", "sequence-to-sequence", "encoder")
    once: bool = False


DECODERS = ("causal", "image-text", "sequence-to-sequence")
CHECKS: dict[str, Check] = {}


def _check(
    exact: bool = False, families: tuple[str, ...] = (*DECODERS, "encoder"), once: bool = False
) -> Callable[[Any], Any]:
    def add(run: Callable[[PeftModel, Subject], float]) -> Callable[[PeftModel, Subject], float]:
        CHECKS[run.__name__] = Check(run, exact, families, once)
        return run

    return add


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference over the largest value, without tokens that a model rules out by the smallest number."""
    if one.shape != other.shape:
        raise ValueError(f"shapes {tuple(one.shape)} and {tuple(other.shape)} can't be compared")
    possible = other > torch.finfo(other.dtype).min / 2
    if not torch.equal(possible, one > torch.finfo(one.dtype).min / 2):
        return math.inf
    one, other = one[possible], other[possible]
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


@_check(exact=True, once=True)
def disabled(model: PeftModel, subject: Subject) -> float:
    """With the adapter disabled, the logits are the base model's."""
    with model.disable_adapter():
        return difference(subject.logits(model, subject.ids), subject.logits(subject.base, subject.ids))


@_check(families=DECODERS)
def causal(model: PeftModel, subject: Subject) -> float:
    """Later tokens change nothing for earlier ones."""
    changed = subject.ids.clone()
    changed[:, -CHANGED:] = (changed[:, -CHANGED:] + 17) % 50 + 5
    return difference(subject.logits(model, changed)[:, :-CHANGED], subject.logits(model, subject.ids)[:, :-CHANGED])


@_check()
def neighbour(model: PeftModel, subject: Subject) -> float:
    """A row's logits are the same with and without the other row."""
    together = subject.logits(model, subject.ids)
    return max(difference(together[[row]], subject.logits(model, subject.ids[[row]], [row])) for row in (0, 1))


def _padded(model: PeftModel, subject: Subject, left: bool) -> float:
    ids, mask = subject.ids.clone(), torch.ones_like(subject.ids)
    padding = slice(0, PADDING) if left else slice(-PADDING, None)
    real = slice(PADDING, None) if left else slice(0, -PADDING)
    ids[1, padding], mask[1, padding] = 0, 0
    together = subject.logits(model, ids, mask=mask)
    alone = subject.logits(model, ids[1:, real], [1], mask=mask[1:, real])
    first = subject.logits(model, ids[:1], [0], mask=mask[:1])
    return max(difference(together[1:, real], alone), difference(together[:1], first))


@_check()
def left_padding(model: PeftModel, subject: Subject) -> float:
    """Padding on the left changes nothing."""
    return _padded(model, subject, left=True)


@_check()
def right_padding(model: PeftModel, subject: Subject) -> float:
    """Padding on the right changes nothing."""
    return _padded(model, subject, left=False)


@_check(families=("causal", "image-text"))
def packing(model: PeftModel, subject: Subject) -> float:
    """Two samples in one row, separated by their positions, are as each alone."""
    first, second = subject.ids[:1, :6], subject.ids[1:, :7]
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    together = subject.logits(model, torch.cat([first, second], 1), [0], position_ids=positions)
    return max(
        difference(together[:, :6], subject.logits(model, first, [0])),
        difference(together[:, 6:], subject.logits(model, second, [1])),
    )


@_check(families=DECODERS)
def cached(model: PeftModel, subject: Subject) -> float:
    """What is generated with a cache, step by step, is what a forward pass of the whole returns."""
    result = subject.generate(model, subject.ids, NEW_TOKENS)
    whole = subject.logits(model, result.sequences[:, :-1])
    return difference(torch.stack(result.logits, 1), whole[:, -NEW_TOKENS:])


@_check(families=DECODERS)
def padded_generation(model: PeftModel, subject: Subject) -> float:
    """A row that is padded on the left generates what it generates alone."""
    ids, mask = subject.ids.clone(), torch.ones_like(subject.ids)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    if subject.two_sided:
        # Or `generate` puts it before the padding, where relative positions differ from those of the row alone.
        ids[0, 0] = ids[1, PADDING] = DECODER_START
    together = subject.generate(model, ids, NEW_TOKENS, mask=mask)
    alone = subject.generate(model, ids[1:, PADDING:], NEW_TOKENS, [1], mask=mask[1:, PADDING:])
    return difference(torch.stack(together.logits, 1)[1:], torch.stack(alone.logits, 1))


@_check(exact=True, once=True)
def reload(model: PeftModel, subject: Subject) -> float:
    """A saved and loaded adapter has the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(subject.base), folder).to(subject.dtype).eval()
    return difference(subject.logits(loaded, subject.ids), subject.logits(model, subject.ids))


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@_check(exact=True, once=True)
def unload(model: PeftModel, subject: Subject) -> float:
    """What `unload` returns is the base model without a trace."""
    plain = copy.deepcopy(model).unload()
    same_names = list(plain.state_dict()) == list(subject.base.state_dict())
    if not same_names or _hooks(plain) != _hooks(subject.base):
        return 1.0
    return difference(subject.logits(plain, subject.ids), subject.logits(subject.base, subject.ids))


@_check(once=True)
def kept_merge(model: PeftModel, subject: Subject) -> float:
    """`merge_and_unload` leaves the logits as they were."""
    merged = copy.deepcopy(model).merge_and_unload()
    return difference(subject.logits(merged, subject.ids), subject.logits(model, subject.ids))


@_check()
def training(model: PeftModel, subject: Subject) -> float:
    """After a plain training step every tensor of the side path has a gradient (LoRA: any); 1 if not.

    Blocks in which LoRA gets none do not run: those of Llama 3.2 Vision that read an image.
    """
    gradients = subject.gradients(model, checkpointing=False)
    trained = {name for name, gradient in gradients.items() if gradient is not None and bool(gradient.any())}
    side_path = {name for name in gradients if "lora_talan" in name}
    of_lora = gradients.keys() - side_path
    low_rank = {block: {name for name in of_lora if name.startswith(block)} for block in map(_block, side_path)}
    idle = {block for block, names in low_rank.items() if names and not names & trained}
    expected = {name for name in side_path if _block(name) not in idle}
    return float(not trained or not expected <= trained or (not expected and bool(side_path)))


def _block(name: str) -> str:
    """The name of the block that a side path's tensor lies in, with the dot that ends it."""
    return name.partition("talan.")[0]


@_check()
def checkpointing(model: PeftModel, subject: Subject) -> float:
    """Gradients are the same with gradient checkpointing."""
    plain = subject.gradients(model, checkpointing=False)
    again = subject.gradients(model, checkpointing=True)
    pairs = [(plain[name], again[name]) for name in plain]
    if any((one is None) != (other is None) for one, other in pairs):
        return 1.0
    largest = max(float(one.abs().max()) for one, _ in pairs if one is not None)
    return max(float((one - other).abs().max()) for one, other in pairs if one is not None) / largest
