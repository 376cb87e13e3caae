"""The whole demo on tiny models: tables, adapters, pictures, and the answer of a fresh process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from peft_talan.cli import main
from peft_talan.cli.console import MISUSED
from peft_talan.sft.comparison import LORA, TALAN, Outcome
from peft_talan.sft.reporting import difference_lines
from peft_talan.sft.scores import Scores

from ..offline_hub import save_tiny_model

STEPS = 2


def test_the_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model", depth=2)
    output = tmp_path / "output"
    words = ["--model", tmp_path / "model", "--output", output, "--held-out", "6", "--ask", "1+2=?"]
    words += ["--steps", STEPS, "--rank", "2", "--batch-size", "2", "--talan-layers", "all", "--talan-mixer", "linear"]
    words += ["--recall-steps", "1"]
    assert main([str(word) for word in ["demo", *words]]) == 0
    printed = capsys.readouterr().out
    for word in (
        "takes about",
        "LoRA+TALAN minus LoRA at 10 windows",
        "exact match",
        "LoRA+TALAN minus LoRA",
        "reloaded in a fresh process: '1+2=?' ->",
    ):
        assert word in printed
    least, most = re.search(r"takes about (\d+) to (\d+) min", printed).groups()
    assert 1 <= int(least) <= int(most)
    commands = [line.strip() for line in printed.split("Next:")[1].splitlines() if line.strip()]
    first_words = [command.split()[:2] for command in commands]
    assert [(Path(program).name, word) for program, word in first_words] == [
        ("peft-talan", "inspect"),
        ("peft-talan", "generate"),
        ("peft-talan", "compare"),
    ]
    results = json.loads((output / "results.json").read_text())
    assert [recalled["arm"] for recalled in results["recall"]] == ["base model", "LoRA", "LoRA+TALAN"]
    base, lora, talan = results["outcomes"]
    assert (base["arm"], lora["arm"], talan["arm"]) == ("base model", "LoRA", "LoRA+TALAN")
    # The same first batch through a fresh adapter: the side path adds nothing yet.
    assert lora["losses"][0] == talan["losses"][0]
    assert len(lora["losses"]) == len(talan["losses"]) == STEPS
    assert talan["trainable"] > lora["trainable"]
    for picture in ("losses.png", "recall.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    saved = json.loads((output / "LoRA+TALAN" / "adapter_config.json").read_text())
    assert (saved["talan_mixer"], saved["talan_layers"]) == ("linear", "all")
    assert json.loads((output / "LoRA" / "prompt_form.json").read_text())["chat"] is True


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--model", "/no/where"], "/no/where: no such file"), (["--task", "nothing"], "--task nothing")],
)
def test_what_can_not_be_run_is_one_line(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *words, "--output", str(tmp_path / "output")]) == MISUSED
    assert named in capsys.readouterr().err


def test_axes_are_refused_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model", depth=2)
    words = ["--model", str(tmp_path / "model"), "--talan-layers", "2", "--output", str(tmp_path / "output")]
    assert main(["demo", *words]) == MISUSED
    printed = capsys.readouterr()
    assert "talan_layers" in printed.err
    assert "1. beyond the window" not in printed.out
    assert not (tmp_path / "output").exists()


def _outcomes(arm: str, losses: list[float], exact: list[list[bool]]) -> list[Outcome]:
    """One outcome per seed, with 40 held-out rows."""
    scores = [Scores(10 * losses, [1] * 10 * len(losses), 10 * part) for part in exact]
    return [Outcome(arm, seed, score, 0.0, trainable=1) for seed, score in enumerate(scores)]


def test_a_clear_difference_says_in_which_direction() -> None:
    low, high = [1.0, 1.1, 1.0, 1.2], [2.0, 2.2, 2.1, 2.1]
    never, always, mixed = [False] * 4, [True] * 4, [True, False, False, True]
    cases = [
        (high, [always] * 3, "worse in loss and better in exact match"),
        (low, [never] * 3, "within noise"),
        (high, [never] * 3, "worse in loss"),
        ([value - 0.9 for value in low], [mixed, never, never], "better in loss"),
    ]
    for losses, exact, verdict in cases:
        (line,) = difference_lines([*_outcomes(LORA, low, [never] * 3), *_outcomes(TALAN, losses, exact)])
        assert line.endswith(f"points: {verdict}"), line


def test_few_seeds_or_rows_decide_nothing() -> None:
    low, high, never = [1.0, 1.1, 1.0, 1.2], [2.0, 2.2, 2.1, 2.1], [False] * 4
    for seeds in (1, 2):
        lora, talan = (_outcomes(arm, losses, [never] * seeds) for arm, losses in ((LORA, low), (TALAN, high)))
        assert f"too few to call ({seeds} seed" in difference_lines([*lora, *talan])[0]
    few = [
        Outcome(arm, seed, Scores(losses, [1] * 4, never), 0.0, trainable=1)
        for arm, losses in ((LORA, low), (TALAN, high))
        for seed in range(3)
    ]
    assert difference_lines(few)[0].endswith("too few to call (3 seeds, 4 rows; 3 and 30 are needed)")
    # Where no difference shows, nothing has to be called.
    assert difference_lines([*_outcomes(LORA, low, [never]), *_outcomes(TALAN, low, [never])])[0].endswith("noise")
