"""The study's runner and statistics, on a tiny model."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.quality import arms, one_run, paired, report, study, tasks
from peft_talan.sft.models import load_model, load_tokenizer

from ..small_models import make_base
from ..test_downstream_apps import TASK

ARMS = ["lora", "lora+talan", "lora-matched"]


def start(backbone: str, results: Path, *options: str) -> dict[str, dict[str, object]]:
    small = ["--steps", "2", "--batch-size", "2", "--held-out", "10", "--held-out-known", "4"]
    common = ["--backbones", backbone, "--tasks", "code", *small, "--results", str(results)]
    study.main([*common, "--adapters-folder", str(results.parent / "adapters"), *options])
    return study.finished(results)


@pytest.fixture(scope="module")
def rows(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    results = tmp_path_factory.mktemp("study") / "quality.jsonl"
    return start(backbone, results, "--adapters", *ARMS, "--seeds", "0", "1")


def test_arms_differ_in_nothing_but_the_adapter(rows: dict[str, dict[str, object]]) -> None:
    assert len(rows) == 6
    found = {(row["settings"]["adapter"], row["settings"]["seed"]): row for row in rows.values()}
    for seed in (0, 1):
        plain, side_path, matched = (found[adapter, seed] for adapter in ARMS)
        # The same low-rank half, data and order: a fresh side path writes nothing, so the first losses are equal.
        assert plain["losses"][0] == side_path["losses"][0] == matched["losses"][0]
        assert plain["losses"][1] != side_path["losses"][1]
        assert plain["trainable"] < side_path["trainable"] <= matched["trainable"]
        assert plain["rank"] == side_path["rank"] < matched["rank"]
        assert set(plain["known"]) == set(tasks.KNOWN_TASKS)
    assert found["lora", 0]["losses"] != found["lora", 1]["losses"]
    assert len({row["weights"] for row in rows.values()}) == 1


def test_a_killed_study_goes_on_where_it_stopped(
    backbone: str, rows: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    results = tmp_path / "quality.jsonl"
    lines = [json.dumps(row) for row in rows.values()]
    # The last line was being written when the process was killed.
    results.write_text("\n".join(lines[:4]) + "\n" + lines[4][:50] + "\n")
    start(backbone, results, "--adapters", *ARMS, "--seeds", "0", "1", "--runs", "1")
    again = start(backbone, results, "--adapters", *ARMS, "--seeds", "0", "1")
    assert again.keys() == rows.keys()
    assert len(results.read_text().splitlines()) == 4 + 1 + 2
    for key, row in rows.items():
        assert again[key]["losses"] == row["losses"]
        assert again[key]["loss"] == row["loss"]


def test_processes_give_what_one_process_gives(
    backbone: str, rows: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    found = start(backbone, tmp_path / "quality.jsonl", "--adapters", "lora", "--seeds", "0", "1", "--jobs", "2")
    assert len(found) == 2
    for key, row in found.items():
        assert row["losses"] == rows[key]["losses"]


def test_lm_eval_tasks_are_taken_by_name(backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"text": f"{i} + {i} =", "target": str(2 * i)} for i in range(4)]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
    options = ["--lm-eval", "continuation", "--lm-eval-folder", str(tmp_path), "--seeds", "0", "--adapters"]
    (row,) = start(backbone, tmp_path / "quality.jsonl", *options, "lora+talan").values()
    model, tokenizer, _ = one_run.loaded(backbone)
    base = one_run.lm_eval_scores(model, tokenizer, ["continuation"], tmp_path)
    assert 1 < row["lm_eval"]["continuation"]["perplexity,none"] != base["continuation"]["perplexity,none"] > 1


def test_exact_match_is_that_of_greedy_decoding(backbone: str) -> None:
    model, tokenizer = load_model(backbone, "float32", "cpu"), load_tokenizer(backbone)
    examples = tasks.held_out("syllogisms", 20)
    settings = one_run.Settings(backbone, "syllogisms", "base", 0, steps=30, learning_rate=1e-2)
    one_run.train(model, tokenizer, tasks.to_train_on("syllogisms", 480, 0, examples), settings)
    scores = one_run.answer_scores(model, tokenizer, examples)
    assert scores["exact_match"] == one_run.written_without_the_answer(model, tokenizer, examples)
    assert 0 < scores["exact_match"] < 1


@pytest.mark.parametrize("task", [*tasks.TASKS, *tasks.KNOWN_TASKS])
def test_held_out_items_are_never_trained_on(task: str) -> None:
    kept = tasks.held_out(task, 50)
    assert len({example.messages for example in kept}) == 50
    trained = tasks.to_train_on(task, 200, 3, kept)
    assert len(trained) == 200
    assert not {example.messages for example in kept} & {example.messages for example in trained}
    assert trained != tasks.to_train_on(task, 200, 4, kept)
    assert trained == tasks.to_train_on(task, 200, 3, kept)


def test_programs_answers_are_what_python_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("code", "programs"):
        for example in tasks.held_out(task, 40):
            program = example.messages[0][1].split("\n", 1)[1]
            exec(program)
            assert capsys.readouterr().out.strip() == example.answer


def test_every_variant_changes_one_axis_and_is_accepted() -> None:
    base = make_base("qwen3", torch.float32)
    for name, axes in arms.VARIANTS.items():
        assert len(axes) == (0 if name == "default" else 1)
        config = arms.make_config("lora+talan", base, 4, ["q_proj"], axes)
        assert all(getattr(config, axis, value) == value for axis, value in axes.items())
    changed = Counter(axis for axes in arms.VARIANTS.values() for axis in axes)
    assert {
        "talan_layers",
        "talan_position",
        "talan_slots",
        "talan_dim",
        "talan_mixer",
        "talan_writeback",
        "talan_trainable",
        "talan_grad_scale",
        "talan_alpha",
        "talan_memory_scope",
        arms.LEARNING_RATE_SCALE,
    } == set(changed)


def test_sign_test_and_interval() -> None:
    assert paired.sign_test(5, 0) == 2 / 2**5
    assert paired.sign_test(3, 3) == 1.0
    assert paired.sign_test(0, 0) == 1.0
    assert paired.sign_test(9, 1) == pytest.approx(2 * (10 + 1) / 2**10)
    summary = paired.summarise([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    assert (summary.mean, summary.low, summary.high, summary.pairs) == (2.0, 2.0, 2.0, 6)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator).tolist()
    wide = paired.summarise([values])
    half = 1.96 * torch.tensor(values).std().item() / math.sqrt(400)
    assert wide.high - wide.low == pytest.approx(2 * half, rel=0.05)
    assert math.isnan(paired.summarise([[1.0, 2.0], [3.0]]).low)
    with pytest.raises(ValueError, match="no pair"):
        paired.summarise([[]])


def test_tables_pair_by_backbone_task_and_seed(rows: dict[str, dict[str, object]], tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text("a\n<!-- table summary -->\nold\n<!-- end -->\nb\n<!-- table scores -->\n<!-- end -->\n")
    found = list(rows.values())
    report.show({"summary": report.summary_table(found), "scores": report.scores_table(found)}, page)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("a\n")
    losses = {(row["settings"]["adapter"], row["settings"]["seed"]): row["loss"] for row in found}
    changes = [100 * (1 - losses["lora+talan", seed] / losses["lora", seed]) for seed in (0, 1)]
    line = next(line for line in text.splitlines() if line.startswith("| lora+talan - lora | loss"))
    # Two seeds give a mean and no interval.
    assert f"| {sum(changes) / 2:+.2f} |" in line
    report.forest_plot(found, tmp_path / "images" / "forest.png")
    assert (tmp_path / "images" / "forest.png").read_bytes().startswith(b"\x89PNG")
