"""What `talan_grad_scale` changes under SGD, Adam, weight decay and clipping, measured on SmolLM2-135M-Instruct.

Each optimizer takes the same batches twice, with scale 1 and with `--scale`, from the same weights. Reported for the
side path and for the LoRA weights: how far they moved, and where they ended, relative to scale 1.

    python -m benchmarks.gradient_scale

The lines go to results/gradient_scale.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peft_talan import TalanConfig
from peft_talan.demo.base_model import default_model_folder
from peft_talan.demo.tasks import make_rows
from peft_talan.sft.models import load_model, load_tokenizer
from peft_talan.sft.prompts import encode

from .measure import machine
from .runs import append_line
from .training import adapted, make_batch, take_step

RESULTS = Path(__file__).parent / "results" / "gradient_scale.jsonl"
BATCH_SIZE = 2
CLIP = 0.1
"""Below the norms of these gradients, so that every step is clipped."""

OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float | None]] = {
    "SGD": (partial(torch.optim.SGD, lr=1e-2), None),
    "SGD, clipped": (partial(torch.optim.SGD, lr=1e-1), CLIP),
    "AdamW": (partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1), None),
    "AdamW, clipped": (partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1), CLIP),
    "AdamW, eps=1e-3": (partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, eps=1e-3), None),
    "Adam, L2 0.1": (partial(torch.optim.Adam, lr=1e-3, weight_decay=0.1), None),
}
Moves = dict[str, dict[str, torch.Tensor]]


def moves(base: Any, tokenizer: Any, scale: float, kind: str, steps: int) -> Moves:
    """How far the tensors of the side path and the LoRA weights moved."""
    make_optimizer, clip = OPTIMIZERS[kind]
    rows = [encode(tokenizer, row) for row in make_rows("chain_sum", steps * BATCH_SIZE, 0).rows]
    config = TalanConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", talan_grad_scale=scale)
    torch.manual_seed(0)
    with adapted(base, config) as model:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = make_optimizer(parameters.values())
        for start in range(0, steps * BATCH_SIZE, BATCH_SIZE):
            loss = model(**make_batch(model, tokenizer, rows[start : start + BATCH_SIZE])).loss
            take_step(model, loss, optimizer, clip=clip)
        found: Moves = {"side path": {}, "low rank": {}}
        for name, parameter in parameters.items():
            found["side path" if ".talan." in name else "low rank"][name] = parameter.detach() - before[name]
    return found


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors.values()]).norm())


def compare(one: dict[str, torch.Tensor], scaled: dict[str, torch.Tensor]) -> dict[str, float]:
    """Lengths, and distances, relative to scale 1."""
    apart = {name: scaled[name] - one[name] for name in one}
    return {"length": norm(scaled) / norm(one), "distance": norm(apart) / norm(one)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or a hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = options.model or default_model_folder()
    base, tokenizer = load_model(folder, "float32", "cpu"), load_tokenizer(folder)
    for name in OPTIMIZERS:
        for steps in options.steps:
            one, scaled = (moves(base, tokenizer, scale, name, steps) for scale in (1.0, options.scale))
            line = {"optimizer": name, "scale": options.scale, "steps": steps}
            line |= {part: compare(one[part], scaled[part]) for part in one}
            print(json.dumps(line), flush=True)
            append_line(options.output, {**line, "machine": machine()})


if __name__ == "__main__":
    main()
