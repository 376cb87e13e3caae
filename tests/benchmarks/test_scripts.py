"""Every script of the benchmarks starts and does its work at the smallest size."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import continuous_batching_matrix, default_layers, gradient_scale
from benchmarks.architectures import __main__ as architectures
from benchmarks.memory import generation, one_run
from benchmarks.quality import arms, backbones, initial_scales, inside, strength, study
from benchmarks.runs import finished, read_lines
from peft_talan.demo import recall

from ..small_models import CONFIGS, DEPTH, VOCABULARY, WINDOW

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPE = "qwen3-0.6b"
SMALL = ["--steps", "1", "--batch-size", "2", "--held-out", "2", "--held-out-known", "1", "--seeds", "0"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script as `python benchmarks/NAME.py` does; the one shape that it may run is tiny."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    conditions = importlib.import_module("conditions")
    monkeypatch.setitem(conditions.SHAPES, SHAPE, CONFIGS["qwen3"])
    return importlib.import_module


@pytest.fixture(scope="module")
def chat_model(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The backbone with a chat template."""
    folder = str(tmp_path_factory.mktemp("chat"))
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    backbones.Qwen3ForCausalLM.from_pretrained(backbone).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["benchmarks.deepspeed_zero", "benchmarks.serving.__main__"])
def test_what_needs_other_programs_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_overhead_is_measured_and_reported(script: Callable[[str], Any], tmp_path: Path) -> None:
    bench, report = script("bench_overhead"), script("report_overhead")
    output = tmp_path / "overhead.jsonl"
    small = "--rounds 2 --decode-rounds 2 --seconds 60 --tokens 16 --contexts 16 --batches 1 --train-tokens 16"
    common = ["--models", SHAPE, "--groups", "lora", "dora", *small.split(), "--output", str(output)]
    bench.main(common)
    lines = read_lines(output)
    of_groups = [measure for measure in ("decode", "prefill", "train") for _ in range(2)]
    assert [line["key"]["measure"] for line in lines] == ["parameters", "attach", "load", *of_groups]
    bench.main(common)
    assert read_lines(output) == lines
    for measure in of_groups:
        for group, title in (("lora", "TALAN / LoRA"), ("dora", "DoRA + TALAN / DoRA")):
            table = report.timing_table(lines, measure, group)
            assert title in table.splitlines()[0]
            assert "| Qwen3-0.6B shape, float32 | " in table
    assert report.memory_table(lines).count("talan / ") == len(of_groups)
    assert report.verdicts(lines).startswith("Of 9 targets: ")
    report.plot(lines, tmp_path / "overhead.svg")
    assert "TALAN" in (tmp_path / "overhead.svg").read_text()
    bench.main([*common[:-1], str(tmp_path / "none.jsonl"), "--measure", "train", "--seconds", "0"])
    left_out = read_lines(tmp_path / "none.jsonl")
    assert all("the limit is 0 s" in line["left_out"] for line in left_out)
    assert report.left_out(left_out).count("| all |") == len(left_out) == 2


def test_a_card_is_measured_and_reported(script: Callable[[str], Any], tmp_path: Path, capsys: Any) -> None:
    bench, output = script("bench_gpu"), tmp_path / "gpu.jsonl"
    small = "--device cpu --dtypes float32 --modes eager --tokens 32 --train-tokens 16 --contexts 16 --batches 2"
    small += " --rounds 2 --decode-rounds 2"
    assert bench.main([*small.split(), "--output", str(output)]) == 0
    lines = read_lines(output)
    measures = [line["key"].get("what", line["key"]["measure"]) for line in lines]
    assert measures == ["equality", *script("calls").OPERATORS, "decode", "prefill", "train"]
    assert set(lines[0]["differences"]) == {"lora", "talan", "talan, all blocks"}
    page = tmp_path / "page.md"
    page.write_text("<!-- table measured on a GPU -->\n<!-- end -->\n")
    bench.main(["--report", "--output", str(output), "--page", str(page)])
    assert "| measurement | condition | ms | ratio |" in capsys.readouterr().out
    assert "| measurement | condition | ms | ratio |" in page.read_text()
    assert all(ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in lines[1]["ratios"].values())


def test_a_card_is_measured_compiled(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, output = script("bench_gpu"), tmp_path / "gpu.jsonl"
    monkeypatch.setattr(bench, "COMPILED_BLOCKS", 1)
    monkeypatch.setattr(bench, "EQUALITY_BLOCKS", 1)
    small = "--device cpu --dtypes float32 --measure decode --contexts 16 --batches 2 --decode-rounds 2"
    assert bench.main([*small.split(), "--conditions", "talan", "--output", str(output)]) == 0
    equality, eager, compiled = read_lines(output)
    assert "torch.compile(mode='reduce-overhead')" in equality["differences"]["talan, all blocks"]
    assert (eager["key"]["compile"], compiled["key"]["mode"]) == (False, "CUDA graphs")
    assert compiled["graph_breaks"] == 0


def test_a_card_that_is_wrong_is_not_timed(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, output = script("bench_gpu"), tmp_path / "gpu.jsonl"
    monkeypatch.setattr(script("gpu_equality"), "LIMIT", 0.0)
    assert bench.main(["--device", "cpu", "--modes", "eager", "--output", str(output)]) == 1
    assert [line["key"]["measure"] for line in read_lines(output)] == ["equality"]


def test_kernels_are_compared(script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, output = script("bench_kernel"), tmp_path / "kernel.json"
    monkeypatch.setattr(kernel, "TOKENS", 64)
    monkeypatch.setattr(kernel, "LONG_TOKENS", 128)
    assert kernel.main(["--repeats", "1", "--calls-per-turn", "1", "--no-compile", "--output", str(output)]) in (0, 1)
    stored = json.loads(output.read_text())
    assert [result["mixer"] for result in stored["remix"]] == ["attention", "linear", "mlp"]
    operations = stored["one_token"]["attention"]
    assert 0 < operations["fused"]["operations"] < operations["reference"]["operations"]


def test_the_side_path_alone(script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost, long_context, papers = script("side_path_cost"), script("long_context"), script("paper_tables")
    for name in cost.SWEEPS:
        monkeypatch.setitem(cost.SWEEPS, name, (8, 16))
    monkeypatch.setattr(cost, "PREFILL", 32)
    cost.main(["--rounds", "1", "--output", str(tmp_path / "side_path_cost.json")])
    output = ["--output", str(tmp_path / "long_context.json")]
    long_context.main(["--lengths", "64", "128", "--measure", "lengths", "--rounds", "1", *output])
    long_context.main(["--decoded", "2000", "--measure", "drift", *output])
    tables = papers.paper_tables(tmp_path)
    assert list(tables) == ["growth", "side path lengths", "drift"]
    assert tables["drift"].splitlines()[-1].startswith("| 2000 | ")


def test_the_limit(script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = script("limit")
    for name, small in (("HIDDEN_SIZE", 32), ("TOKENS", 64), ("SQUARE", 16), ("LARGE", 256)):
        monkeypatch.setattr(limit, name, small)
    limit.main(["--rounds", "1", "--output", str(tmp_path / "limit.json")])
    calls = json.loads((tmp_path / "limit.json").read_text())["calls"]
    assert list(calls) == ["prefill", "training step", "decoded token"]
    assert all(min(call.values()) > 0 for call in calls.values())
    assert calls["training step"]["operations"] > calls["prefill"]["operations"] > calls["decoded token"]["operations"]


def test_values_of_talan_layers_mean_as_many_blocks_as_the_page_says(script: Callable[[str], Any]) -> None:
    tables, conditions = script("answer_tables"), script("conditions")
    base = script("conditions").load_base(SHAPE, torch.float32)
    for layers, name in tables.CONDITIONS.items():
        blocks = tables.number_of_blocks(layers, DEPTH)
        if blocks:
            model = conditions.make_conditions(base, [name])[name]
            assert sum(hasattr(block, "talan") for block in model.base_model.model.model.layers) == blocks


def test_the_roofline(script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roofline, papers = script("roofline"), script("paper_tables")
    roofline.main(["--models", SHAPE, "--output", str(tmp_path / "roofline.json")])
    assert list(papers.paper_tables(tmp_path)) == ["parameters", "roofline", "operations", "gpu"]
    model = json.loads((tmp_path / "roofline.json").read_text())["models"][SHAPE]
    assert model["parameters"] == sum(p.numel() for p in roofline.on_meta(CONFIGS["qwen3"]).parameters())


def test_the_picture_of_the_memory(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = script("pictures")
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    (tmp_path / "concepts").mkdir()
    pictures.draw_memory()
    assert (tmp_path / "concepts" / "memory.svg").read_text().startswith("<?xml")


def test_placements_are_compared(chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "default_layers.jsonl"
    common = ["--model", chat_model, "--steps", "1", "--jobs", "1", "--results", str(results), "--seeds"]
    default_layers.main([*common, "0"])
    rows = read_lines(results)
    assert [row["placement"] for row in rows] == list(default_layers.PLACEMENTS)
    # What is stored is not run again, whether or not it has a key, as the older lines have none.
    results.write_text("".join(json.dumps({**row, "key": None}) + "\n" for row in rows))
    default_layers.main([*common, "0"])
    assert len(read_lines(results)) == len(rows)
    assert f"{rows[0]['held_out_loss']:.4f}" in capsys.readouterr().out


def test_gradient_scales_are_compared(chat_model: str, tmp_path: Path) -> None:
    output = tmp_path / "gradient_scale.jsonl"
    gradient_scale.main(["--model", chat_model, "--steps", "1", "--output", str(output)])
    rows = {row["optimizer"]: row for row in read_lines(output)}
    assert list(rows) == list(gradient_scale.OPTIMIZERS)
    # Adam's step does not depend on the scale; SGD's is as much smaller as the scale.
    assert rows["SGD"]["side path"]["length"] == pytest.approx(0.1, rel=1e-3)
    assert rows["AdamW"]["side path"]["length"] == pytest.approx(1.0, rel=1e-2)
    assert rows["SGD"]["low rank"]["distance"] == 0.0


def test_continuous_batching_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "continuous_batching.jsonl"
    monkeypatch.setattr(continuous_batching_matrix, "PAGES", dict([*continuous_batching_matrix.PAGES.items()][:1]))
    common = ["--architectures", "qwen3", "--attention", "sdpa", "--out", str(out)]
    continuous_batching_matrix.main(common)
    assert "LoRA: 1 of 1 settings equal\nTALAN: 3 of 3 settings equal" in capsys.readouterr().out
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:-1]) + "\n")
    continuous_batching_matrix.main(common)
    assert out.read_text().splitlines() == lines


def test_a_model_type_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "architectures.jsonl"
    architectures.main(["--types", "gpt2", "--families", "causal", "--results", str(results), "--checks", "causal"])
    (row,) = read_lines(results)
    assert {cell["outcome"] for cells in row["checks"].values() for cell in cells.values()} == {"right"}
    monkeypatch.setattr(architectures, "PAGE", tmp_path / "page.md")
    architectures.main(["--report", "--results", str(results)])
    assert "| `gpt2` | right |  |" in (tmp_path / "page.md").read_text()


def test_chunks_of_a_long_text_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(one_run.BASE_STEPS, ("window", "key"), 2)
    results = tmp_path / "generation.jsonl"
    small = "--tokens 160 320 --chunk 48 --rows 4 --steps 1 --longest-trained 2"
    generation.main([*small.split(), "--results", str(results)])
    rows = read_lines(results)
    assert [(row["arm"], row["tokens"]) for row in rows] == [
        (arm, tokens) for arm in ("LoRA", "TALAN, all blocks") for tokens in (160, 320)
    ]
    assert rows[2]["bytes_a_row"] == rows[3]["bytes_a_row"]


def test_a_backbone_is_pretrained_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = backbones.Pretraining(tasks=("sums", "short code"), steps=3, text_every=2, sorted_rows=True)
    monkeypatch.setitem(backbones.PRETRAINED_HERE, "tiny-qwen3", recipe)
    monkeypatch.setattr(backbones, "KNOWN_ITEMS", 40)
    hashes = []
    for parts, seconds in (("whole", 600.0), ("stopped", 0.0)):
        monkeypatch.setenv("PEFT_TALAN_CACHE", str(tmp_path / parts))
        calls = 1
        while not backbones.pretrain("tiny-qwen3", seconds):
            calls += 1
        assert calls == (1 if parts == "whole" else 3)
        folder = backbones.backbone_folder("tiny-qwen3")
        hashes.append(backbones.weights_hash(backbones.Qwen3ForCausalLM.from_pretrained(folder)))
    assert hashes[0] == hashes[1]


def test_trained_adapters_are_measured(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters, results = ["--adapters-folder", str(tmp_path / "adapters")], tmp_path / "quality.jsonl"
    common = ["--backbones", backbone, *SMALL, "--results", str(results)]
    study.main([*common, *adapters, "--tasks", "code", "--adapters", "lora", "lora+talan"])
    for script, name in ((inside, "inside"), (strength, "strength")):
        stored = tmp_path / f"{name}.jsonl"
        for _ in range(2):
            script.main(["--study", str(results), "--results", str(stored), *adapters])
            assert [row["settings"]["adapter"] for row in read_lines(stored)] == ["lora+talan"]
    table = capsys.readouterr().out
    assert "| perturbation / residual stream | 1 |" in table
    assert "| 1.5 | 1 |" in table


def test_initial_scales_change_the_side_path_alone(backbone: str, tmp_path: Path) -> None:
    results = tmp_path / "scales.jsonl"
    initial_scales.main(["--backbones", backbone, *SMALL, "--steps", "3", "--results", str(results)])
    rows = {row["settings"]["variant"]: row for row in finished(results).values()}
    assert list(rows) == list(arms.INITIAL_SCALES)
    # A fresh side path writes nothing, whatever it reads.
    assert len({row["losses"][0] for row in rows.values()}) == 1
    assert len({row["losses"][2] for row in rows.values()}) == len(rows)
    base = arms.make_config("lora+talan", None, 4, ["q_proj"], {})
    model = recall.pretrained("key", 0, 1)
    found = {}
    for variant in ("default", *arms.INITIAL_SCALES):
        torch.manual_seed(0)
        with importlib.import_module("benchmarks.training").adapted(model, base) as tuned:
            arms.prepare(tuned, variant, {})
            (read,) = [p.detach().clone() for name, p in tuned.named_parameters() if "lora_talan_read" in name]
            found[variant] = read
    width, (slots, queries) = base.talan_dim, arms.INITIAL_SCALES["init slots x3 queries x4"]
    factors = torch.ones(len(found["default"]), 1)
    factors[width : 2 * width], factors[2 * width :] = queries, slots
    assert torch.equal(found["init slots x3 queries x4"], factors * found["default"])


def test_attention_in_windows_is_that_of_transformers(script: Callable[[str], Any]) -> None:
    script("window_attention")
    of_transformers, in_pieces = (
        AutoModelForCausalLM.from_config(CONFIGS["mistral"], attn_implementation=name, dtype=torch.float64).eval()
        for name in ("sdpa", "windows")
    )
    in_pieces.load_state_dict(of_transformers.state_dict())
    ids = torch.randint(2, VOCABULARY, (2, 5 * WINDOW + 3), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, found = (torch.stack(model.generate(ids, **options).logits) for model in (of_transformers, in_pieces))
    torch.testing.assert_close(found, expected)
