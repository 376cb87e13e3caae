"""What `talan_grad_scale` changes under SGD, Adam, weight decay and clipping, measured on SmolLM2-135M-Instruct.

Each optimizer takes the same batches twice, with scale 1 and with `--scale`, from the same weights. Reported for each
half of the adapter: how far it moved, and where it ended, relative to scale 1.

    python benchmarks/gradient_scale.py

The lines go to results/gradient_scale.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import machine
from peft import PeftModel, get_peft_model
from supervised import encode, load_base_model, make_batch, make_examples
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_talan import TalanConfig
from peft_talan.demo.base_model import default_model_folder

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


def trained(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scale: float,
    optimizer: Callable[..., torch.optim.Optimizer],
    clip: float | None,
    steps: int,
) -> dict[str, dict[str, torch.Tensor]]:
    """How far each half's tensors moved, and their gradients' norms in the first step."""
    torch.manual_seed(0)
    model: PeftModel = get_peft_model(
        base, TalanConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", talan_grad_scale=scale)
    )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    step_of = optimizer(parameters.values())
    examples = [encode(tokenizer, example) for example in make_examples("chain_sum", steps * BATCH_SIZE, 0)]
    for step in range(steps):
        batch = make_batch(examples[step * BATCH_SIZE : (step + 1) * BATCH_SIZE], tokenizer.pad_token_id)
        model(**batch).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        step_of.step()
        step_of.zero_grad()
    moved = {name: p.detach() - before[name] for name, p in parameters.items()}
    model.unload()
    return {
        "side path": {name: tensor for name, tensor in moved.items() if ".talan." in name},
        "low rank": {name: tensor for name, tensor in moved.items() if ".talan." not in name},
    }


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors.values()]).norm())


def compare(one: dict[str, torch.Tensor], scaled: dict[str, torch.Tensor]) -> dict[str, float]:
    """Lengths, and distances, relative to scale 1."""
    apart = {name: scaled[name] - one[name] for name in one}
    return {"length": norm(scaled) / norm(one), "distance": norm(apart) / norm(one)}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base, tokenizer = load_base_model(default_model_folder())
    for name, (optimizer, clip) in OPTIMIZERS.items():
        for steps in arguments.steps:
            one, scaled = (trained(base, tokenizer, scale, optimizer, clip, steps) for scale in (1.0, arguments.scale))
            result: dict[str, Any] = {half: compare(one[half], scaled[half]) for half in one}
            line = {"optimizer": name, "scale": arguments.scale, "steps": steps, **result}
            print(json.dumps(line), flush=True)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "machine": machine()}) + "\n")


if __name__ == "__main__":
    main()
