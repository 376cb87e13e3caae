"""Draws the pictures of docs/ that show real runs: `python benchmarks/pictures.py`. Needs matplotlib; some seconds."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from peft import get_peft_model
from transformers import AutoModel, Qwen3Config

from peft_talan import TalanConfig, TalanLayer

matplotlib.use("svg")
from matplotlib import pyplot

DOCS = Path(__file__).parents[1] / "docs"
FIRST, SECOND, CHANGED = 20, 12, 12
SCOPES = ("causal", "bidirectional")


def writes(scope: str, tokens: torch.Tensor) -> torch.Tensor:
    """Run two packed samples through a small Qwen3 and give its side path's h' - h, [tokens, hidden_size]."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        use_cache=False,
    )
    side_path = TalanConfig(
        task_type="FEATURE_EXTRACTION", r=0, talan_layers=[0], talan_memory_scope=scope, init_talan_weights=False
    )
    model = get_peft_model(AutoModel.from_config(config), side_path).double().eval()
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, TalanLayer):
            module.register_forward_hook(lambda _, given, output: seen.append(output - given[0]))
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]
    with torch.no_grad():
        model(tokens, position_ids=positions)
    return seen[0][0]


def draw_memory() -> None:
    """Draw which tokens' write-back a changed token reaches."""
    tokens = torch.arange(FIRST + SECOND)[None] % 50 + 3
    changed = tokens.clone()
    changed[0, CHANGED] = 1
    figure, panels = pyplot.subplots(2, 1, figsize=(7.2, 4.6), sharex=True, layout="constrained")
    for panel, scope in zip(panels, SCOPES, strict=True):
        before = writes(scope, tokens)
        change = (writes(scope, changed) - before).norm(dim=-1) / before.norm(dim=-1)
        colours = ["#c77f2a" if value else "#bbbbbb" for value in change.tolist()]
        panel.bar(range(len(change)), change.clamp_min(1e-4), color=colours)
        for place in torch.nonzero(change == 0)[:, 0].tolist():
            panel.text(place, 1.2e-4, "0", ha="center", va="bottom", fontsize=10, color="#666666")
        panel.set_yscale("log")
        panel.set_ylim(1e-4, 3)
        panel.axvline(FIRST - 0.5, color="#4a6fa5", linestyle="--")
        panel.text(FIRST - 0.3, 1.3, "next packed sample", color="#4a6fa5", fontsize=10, va="center")
        panel.set_title(f'talan_memory_scope="{scope}"', loc="left", fontsize=11)
        panel.set_ylabel("relative change")
    panels[-1].set_xlabel(f"token; the one at {CHANGED} was changed")
    pyplot.rcParams.update({"svg.hashsalt": "peft_talan", "svg.fonttype": "none"})
    figure.savefig(DOCS / "concepts" / "memory.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw_memory()
