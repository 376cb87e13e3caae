"""A tiny model with adapters on disk, and the command line called as a shell calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_talan import TalanConfig
from peft_talan.cli import main
from peft_talan.cli.console import MISUSED

from ..offline_hub import save_tiny_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `adapter` and `lora` (a plain one), all with random weights."""
    folder = tmp_path_factory.mktemp("saved")
    save_tiny_model(folder / "model", depth=4)
    shared = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    talan = TalanConfig(**shared, talan_layers=[1, -1], talan_slots=3, talan_dim=5, init_talan_weights=False)
    for name, config in (("adapter", talan), ("lora", LoraConfig(**shared))):
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str | Path]], str]:
    """Runs a command that must work, and gives its stdout."""
    # Set by what runs the tests: tables would be as narrow as its terminal.
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(arguments: list[str | Path]) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with one line on stderr and nothing on stdout, and gives that line."""

    def run(arguments: list[str | Path], code: int = MISUSED) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("peft-talan")
        return printed.err

    return run
