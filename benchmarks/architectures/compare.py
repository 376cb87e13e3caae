"""Runs the checks on plain LoRA and on TALAN, and says of each: right, refused, wrong, crash, or LoRA itself fails."""

from __future__ import annotations

import copy
import dis
import math
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import peft_talan
from peft_talan import TalanConfig

from .checks import CHECKS, FLOOR, LARGEST_ROUNDING, Check, difference
from .subject import Subject
from .tiny import make_base

PLACEMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "first and last": {"talan_layers": [0, -1]},
}
"""Where the side path runs; the default has to attach without help."""
ONCE = "first and last"
PACKAGE = str(Path(peft_talan.__file__).parent)
SLACK = 10
"""A difference is a fault where it is this many times that of LoRA, which has its own rounding."""
SEVEREST = ("crash", "wrong", "refused", "right", "LoRA fails")
"""The outcomes; of several placements', the first one in this order counts."""


def _error(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({place})"


def is_refusal(error: BaseException) -> bool:
    """Whether an error is one that this package raised by intent, and not a fault."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    code = place.tb_frame.f_code
    return code.co_filename.startswith(PACKAGE) and code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def add_adapter(subject: Subject, **options: Any) -> PeftModel:
    """A copy of the base model with an adapter that changes its output; LoRA where there are no options."""
    low_rank = {"r": 4, "target_modules": subject.targets, "init_lora_weights": False}
    config = TalanConfig(**{**low_rank, **options}) if options else LoraConfig(**low_rank)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(subject.base), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_talan" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif "lora_" in name:
                parameter.mul_(3)
    return model.to(subject.dtype).eval()


def _add_lora(subject: Subject) -> PeftModel:
    lora = add_adapter(subject)
    if not bool(subject.logits(lora, subject.ids).isfinite().all()):
        raise ArithmeticError("the logits are not finite")
    return lora


def _options(subject: Subject, placement: str) -> dict[str, Any]:
    scope = "bidirectional" if subject.family == "encoder" else "causal"
    return {"talan_memory_scope": scope, "init_talan_weights": False, **PLACEMENTS[placement]}


def _fresh(subject: Subject, lora: PeftModel, placement: str) -> float:
    """A side path whose write-back is zero changes no bit."""
    fresh = add_adapter(subject, **_options(subject, placement))
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_talan_write" in name:
                parameter.zero_()
    fresh.load_state_dict({k: v for k, v in lora.state_dict().items() if "lora_" in k}, strict=False)
    return difference(subject.logits(fresh, subject.ids), subject.logits(lora, subject.ids))


def _effect(subject: Subject, model: PeftModel, lora: PeftModel) -> float:
    """1 where the side path changes no bit."""
    model.load_state_dict({k: v for k, v in lora.state_dict().items() if "lora_" in k}, strict=False)
    return float(torch.equal(subject.logits(model, subject.ids), subject.logits(lora, subject.ids)))


def _lora_difference(check: Check, lora: PeftModel, subject: Subject) -> tuple[float, str]:
    """LoRA's own difference, with positions passed where that alone is right."""
    message = ""
    found = math.nan
    for passes_positions in (False, True) if "position_ids" in subject.arguments else (False,):
        subject.passes_positions = passes_positions
        try:
            found = check.run(lora, subject)
        except Exception as error:  # noqa: BLE001 - whatever fails is what the table says
            message = _error(error)
            continue
        if found <= (0 if check.exact else LARGEST_ROUNDING):
            return found, ""
    return math.nan, message or f"differs by {found:.1e}"


def _outcome(allowed: float, run: Any) -> dict[str, Any]:
    try:
        found = run()
    except Exception as error:  # noqa: BLE001 - as above: it goes into the table
        return {"outcome": "refused" if is_refusal(error) else "crash", "message": _error(error)}
    return {"outcome": "right" if found <= allowed else "wrong", "difference": found}


def examine(family: str, model_type: str, names: list[str]) -> dict[str, Any]:
    """Run checks on one model type; the outcomes by check and placement, or `base`, which says why there is none."""
    base_error, stage = "", "not built"
    for dtype in (torch.float64, torch.float32):
        try:
            subject = Subject(make_base(family, model_type, dtype), family)
            stage = "LoRA fails"
            lora = _add_lora(subject)
            break
        except Exception as error:  # noqa: BLE001 - whatever fails is what the table says
            base_error = _error(error)
    else:
        return {"base": stage, "message": base_error}
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "checks": {}}
    models: dict[str, PeftModel] = {}

    def attach(placement: str) -> float:
        models[placement] = add_adapter(subject, **_options(subject, placement))
        return 0.0

    found["checks"]["attach"] = {p: _outcome(0, lambda p=p: attach(p)) for p in PLACEMENTS}
    if "fresh" in names:
        found["checks"]["fresh"] = {p: _outcome(0, lambda p=p: _fresh(subject, lora, p)) for p in models if p == ONCE}
    if "effect" in names:
        found["checks"]["effect"] = {p: _outcome(0, lambda m=m: _effect(subject, m, lora)) for p, m in models.items()}
    for name, check in CHECKS.items():
        if name not in names or family not in check.families:
            continue
        allowed, message = _lora_difference(check, lora, subject)
        if math.isnan(allowed):
            found["checks"][name] = {"lora": {"outcome": "LoRA fails", "message": message}}
            continue
        allowed = 0 if check.exact else max(FLOOR, SLACK * allowed)
        found["checks"][name] = {
            placement: _outcome(allowed, lambda m=model, c=check: c.run(m, subject))
            for placement, model in models.items()
            if placement == ONCE or not check.once
        }
    return found
