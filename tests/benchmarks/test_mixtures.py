"""The study of mixtures, on a tiny model: equal tries, the choice, and going on after a stop."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import arms, mixtures, mixtures_report, one_run, study, tasks

PAGE = Path(__file__).parents[2] / "docs" / "evidence-tables.md"
ARMS = ["lora", "lora+talan", "lora-matched"]
TRIES = 3
Rows = dict[str, dict[str, Any]]


def start(backbone: str, results: Path, *options: str) -> Rows:
    small = [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--held-out",
        "4",
        "--held-out-known",
        "2",
        "--tries",
        str(TRIES),
        "--mixture",
        "mixture",
    ]
    common = ["--backbones", backbone, "--adapters", *ARMS, "--seeds", "0", "1", *small, "--results", str(results)]
    mixtures.main([*common, "--adapters-folder", str(results.parent / "adapters"), *options])
    return study.finished(results)


@pytest.fixture(scope="module")
def rows(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return start(backbone, tmp_path_factory.mktemp("mixtures") / "mixtures.jsonl")


def of_arm(rows: Rows, arm: str, development: bool) -> list[dict[str, Any]]:
    found = [row for row in rows.values() if row["settings"]["adapter"] == arm]
    return [row for row in found if (row["settings"]["seed"] == tasks.DEVELOPMENT_SEED) == development]


def test_every_arm_has_equally_many_tries_and_the_best_goes_on(rows: Rows) -> None:
    assert len(rows) == 1 + len(ARMS) * (TRIES + 2)
    for arm in ARMS:
        tries, fresh = of_arm(rows, arm, True), of_arm(rows, arm, False)
        assert len(tries) == TRIES
        taken = min(tries, key=lambda row: row["loss"])["settings"]
        assert [row["settings"]["seed"] for row in fresh] == [0, 1]
        for row in fresh:
            assert row["settings"] == {**taken, "seed": row["settings"]["seed"]}
            assert row["exact_match"] == sum(part["exact_match"] for part in row["tasks"].values()) / len(tasks.TASKS)
    assert [row["settings"]["learning_rate"] for row in of_arm(rows, "lora", True)] == [1e-3, 2e-3, 5e-4]
    names = [row["settings"]["variant"] for row in of_arm(rows, "lora+talan", True)]
    assert names == ["default", "default", *list(arms.SIDE_PATH_TRIES)[: TRIES - 2]]
    side_path, matched = (of_arm(rows, arm, False)[0] for arm in ("lora+talan", "lora-matched"))
    assert side_path["trainable"] <= matched["trainable"] < 1.2 * side_path["trainable"]


def test_a_stopped_study_goes_on(backbone: str, rows: Rows, tmp_path: Path) -> None:
    results = tmp_path / "mixtures.jsonl"
    # Stopped before the last fresh seed of LoRA+TALAN, and before all of the matched arm's.
    kept = [row for row in rows.values() if row["settings"]["adapter"] != "lora-matched"][:-1]
    results.write_text("".join(json.dumps(row) + "\n" for row in kept))
    again = start(backbone, results)
    assert again.keys() == rows.keys()
    assert len(results.read_text().splitlines()) == len(rows)
    assert all(again[key]["losses"] == row["losses"] for key, row in rows.items() if "losses" in row)


def test_a_try_that_loses_plain_text_is_not_taken() -> None:
    base = {"text_loss": 3.0}
    good = {"loss": 1.0, "text_loss": 3.0 + math.log(1.09)}
    bad = {"loss": 0.5, "text_loss": 3.0 + math.log(1.11)}
    assert mixtures.best([bad, good], base) is good
    worse = {"loss": 0.1, "text_loss": 4.0}
    assert mixtures.best([worse, bad], base) is bad


def test_lower_rates_are_tried_before_other_axes_while_none_keeps_plain_text(
    backbone: str, rows: Rows, tmp_path: Path
) -> None:
    """A rate at which the low-rank half alone loses plain text says nothing about the side path's axes."""
    results = tmp_path / "mixtures.jsonl"
    first, second, *_ = of_arm(rows, "lora+talan", development=True)
    base = next(row for row in rows.values() if row["settings"]["adapter"] == "base")
    lost = [{**row, "text_loss": base["text_loss"] + 1.0} for row in (first, second)]
    results.write_text("".join(json.dumps(row) + "\n" for row in [base, *lost]))
    tries = of_arm(start(backbone, results), "lora+talan", development=True)
    assert [(row["settings"]["learning_rate"], row["settings"]["variant"]) for row in tries] == [
        (1e-3, "default"),
        (2e-3, "default"),
        (5e-4, "default"),
    ]


def test_development_items_and_scored_items_are_trained_on_by_no_seed() -> None:
    count = 20
    scored = tasks.scored_items("mixture", count, seed=0)
    chosen_on = tasks.scored_items("mixture", count, tasks.DEVELOPMENT_SEED)
    assert list(scored) == list(chosen_on) == list(tasks.TASKS)
    for seed in (0, tasks.DEVELOPMENT_SEED):
        trained = tasks.items_to_train_on("mixture", 80, seed, count)
        assert len(trained) == 80
        for name in tasks.TASKS:
            assert len({*scored[name], *chosen_on[name]}) == 2 * count
            assert not {*scored[name], *chosen_on[name]} & set(trained)


def test_no_backbone_knows_a_scored_question_in_its_short_form() -> None:
    for name, shorten in tasks.SHORTENED.items():
        kept = {example.messages[0][1] for example in tasks.held_out(f"short {name}", 300)}
        for seed in (0, tasks.DEVELOPMENT_SEED):
            questions = [example.messages[0][1] for example in tasks.scored_items("mixture", 100, seed)[name]]
            assert {shorten(question) for question in questions} <= kept


def test_two_stages_and_a_first_write_change_the_training(backbone: str) -> None:
    def losses(adapter: str, axes: dict[str, Any]) -> list[float]:
        settings = one_run.Settings(
            backbone, "mixture", adapter, 0, axes=axes, steps=6, batch_size=4, held_out=4, held_out_known=1
        )
        found: list[float] = one_run.run(settings)["losses"]
        return found

    plain, joint = losses("lora", {}), losses("lora+talan", {})
    staged = losses("lora+talan", {arms.TWO_STAGES: True})
    # The low-rank half alone for three steps; the loss after the first joint step is the next.
    assert staged[:4] == plain[:4]
    assert staged[4] != plain[4]
    assert joint[1] != plain[1]
    assert losses("lora+talan", {arms.FIRST_WRITE: 0.05})[0] != joint[0]


def test_tables_show_every_arm_and_the_choice(rows: Rows) -> None:
    found = list(rows.values())
    scores = mixtures_report.scores_table(found).splitlines()
    assert len({line.count("|") for line in scores}) == 1
    assert [line.split(" | ")[1] for line in scores[2:]] == ["backbone", *(mixtures_report.NAMES[arm] for arm in ARMS)]
    assert mixtures_report.tries_table(found).count("| yes |") == len(ARMS)
    compared = mixtures_report.differences_table(found)
    losses = {(row["settings"]["adapter"], row["settings"]["seed"]): row["loss"] for row in found}
    changes = [100 * (1 - losses["lora+talan", seed] / losses["lora", seed]) for seed in (0, 1)]
    line = next(line for line in compared.splitlines() if "LoRA+TALAN against LoRA | loss, % lower" in line)
    assert f"| {sum(changes) / 2:+.2f}" in line
    assert Counter(line.split(" | ")[1] for line in compared.splitlines()[2:]) == {
        "LoRA+TALAN against LoRA": 5,
        "LoRA+TALAN against LoRA, as many parameters": 5,
        "LoRA, as many parameters against LoRA": 5,
    }


def test_the_page_shows_the_stored_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tables = mixtures_report.tables_of(mixtures.MIXTURE_RESULTS, mixtures_report.INSIDE_RESULTS)
    for name, table in tables.items():
        assert table in text, f"{name}: python -m benchmarks.quality.mixtures_report --page docs/evidence-tables.md"
