"""A base model with several adapters, TALAN and plain ones, and what `generate` says with each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from . import engines

PLAIN = "plain"
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {},
    "second": {"talan_alpha": 0.7, "talan_layers": [1], "r": 8},
    "third": {"talan_layers": [2], "talan_mixer": "mlp", "talan_writeback": "gated", "talan_position": "input"},
}


class Family:
    """A base model, adapters for it, and the answers of `generate` with each."""

    def __init__(self, folder: Path, architecture: str, adapters: dict[str, dict[str, Any]]) -> None:
        self.folder, self.prompts, self.names = folder, engines.make_prompts()[1:6], [*adapters, PLAIN]
        config = engines.CONFIGS[architecture]
        engines.make_base(config).save_pretrained(self.base)
        for number, (name, options) in enumerate(adapters.items()):
            engines.adapt(engines.make_base(config), "default", number + 1, **options).save_pretrained(folder / name)
        with torch.random.fork_rng():
            torch.manual_seed(9)
            plain = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(engines.make_base(config), plain).save_pretrained(folder / PLAIN)
        self.answers: dict[str | None, list[list[int]]] = {None: engines.generate(self.base, self.prompts)}
        for name in self.names:
            self.answers[name] = engines.generate(self.base, self.prompts, adapter=folder / name)
            assert sum(one != other for one, other in zip(self.answers[name], self.answers[None], strict=True)) >= 4

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def request(self, name: str | None) -> tuple[str, int, str] | None:
        return None if name is None else (name, self.names.index(name) + 1, str(self.folder / name))

    def options(self, **options: Any) -> dict[str, Any]:
        """Those of an engine with room for all adapters."""
        folders = [str(self.folder / name) for name in self.names]
        shared = {"enable_lora": True, "max_loras": len(self.names), "max_lora_rank": 8}
        return {**shared, "additional_config": {"talan": {"adapters": folders}}, **options}

    def check(self, served: Any, names: list[str | None]) -> list[int]:
        """Each prompt with each adapter, in one batch; gives the cached tokens of each request."""
        pairs = [(name, number) for number in range(len(self.prompts)) for name in names]
        prompts = [self.prompts[number] for _, number in pairs]
        answers, cached = engines.ask(served, prompts, adapters=[self.request(name) for name, _ in pairs])
        expected = [self.answers[name][number] for name, number in pairs]
        assert [pair for pair, one, other in zip(pairs, answers, expected, strict=True) if one != other] == []
        return cached
