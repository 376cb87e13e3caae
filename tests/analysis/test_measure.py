"""The measured inner states are those that plain arithmetic on recorded hidden states gives."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas
import pytest
import torch
from peft import PeftModel, get_peft_model

from benchmarks.architectures.tiny import make_base as make_any
from peft_talan import TalanConfig, talan_strength
from peft_talan.analysis import (
    measure_blocks,
    measure_propagation,
    measure_reads,
    plot_blocks,
    plot_propagation,
    plot_slot_usage,
    plot_token_slots,
    to_rows,
)
from peft_talan.analysis.report import TABLES, analyze

from ..checkpoint.test_transformers_path import make_tokenizer
from ..small_models import DEPTH, logits, make_base, make_config, make_model, make_several, make_tokens, rounding


def streams(model: torch.nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Behind every block but the last, by transformers' own recording: its last state is after the final norm."""
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    return list(states[1:-1])


def length(change: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(change, dim=-1).mean())


def padded(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(tokens)
    mask[0, -4:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma3n_text", "prophetnet", "xlnet"])
def test_the_stream_that_is_measured_is_the_one_that_the_side_path_reads(model_type: str) -> None:
    """Without LoRA weights, what was written at a block is what changed in its stream."""
    options = {"r": 0, "talan_layers": [1], "init_talan_weights": False}
    model = get_peft_model(make_any("causal", model_type), TalanConfig(**options)).to(torch.float64)
    blocks = measure_blocks(model, {"input_ids": make_tokens(tokens=9)})
    assert blocks[1].written_norm == pytest.approx(blocks[1].side_path_norm, rel=1e-9)
    assert blocks[1].side_path_norm > 0 == blocks[0].side_path_norm


def test_blocks_that_run_more_than_once_are_not_measured() -> None:
    model = get_peft_model(make_any("causal", "hrm_text"), TalanConfig(r=0))
    with pytest.raises(ValueError, match="its 2 blocks ran 4 times"):
        measure_blocks(model, {"input_ids": make_tokens()})


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_block_measures_are_differences_of_recorded_streams(architecture: str) -> None:
    model = make_model(architecture, make_config(talan_layers=[1]))
    tokens = make_tokens()
    blocks = measure_blocks(model, {"input_ids": tokens})
    both = streams(model, tokens)
    with talan_strength(model, 0):
        low_rank = streams(model, tokens)
    with model.disable_adapter():
        base = streams(model, tokens)
    assert [measure.block for measure in blocks] == list(range(DEPTH))
    for index, measure in enumerate(blocks[:-1]):
        update, change = low_rank[index] - base[index], both[index] - low_rank[index]
        assert measure.hidden_norm == pytest.approx(length(both[index]), rel=1e-9)
        assert measure.low_rank_norm == pytest.approx(length(update), rel=1e-9)
        assert measure.side_path_norm == pytest.approx(length(change), rel=1e-9)
        if index < 1:
            assert measure.side_path_norm == 0
            assert measure.ratio is None
            assert measure.cosine is None
        else:
            assert measure.ratio == pytest.approx(length(update) / length(change), rel=1e-9)
            cosine = torch.cosine_similarity(update, change, dim=-1).mean()
            assert measure.cosine == pytest.approx(float(cosine), rel=1e-9)
    # At its own block, what a side path writes is all that it has changed so far.
    assert blocks[1].written_norm == pytest.approx(blocks[1].side_path_norm, rel=1e-9)
    assert blocks[1].written_ratio == pytest.approx(blocks[1].ratio, rel=1e-9)
    assert [measure.written_norm is None for measure in blocks] == [True, False, True, True]


def test_what_is_written_at_an_input_is_compared_there() -> None:
    model = make_model("qwen3", make_config(talan_layers=[2], talan_position="input"))
    tokens = make_tokens()
    measure = measure_blocks(model, {"input_ids": tokens})[2]
    with talan_strength(model, 0):
        low_rank = streams(model, tokens)
    with model.disable_adapter():
        base = streams(model, tokens)
    written = streams(model, tokens)[1] - low_rank[1]
    assert measure.written_norm == pytest.approx(length(written), rel=1e-9)
    assert measure.written_ratio == pytest.approx(length(low_rank[1] - base[1]) / length(written), rel=1e-9)


def test_propagation_follows_one_side_path_at_a_time() -> None:
    model = make_model("qwen3", make_config(talan_layers=[0, 2]))
    tokens = make_tokens()
    found = {(item.source, item.block): item for item in measure_propagation(model, {"input_ids": tokens})}
    assert sorted(found) == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 2), (2, 3)]
    with talan_strength(model, 0):
        off = streams(model, tokens)
        with talan_strength(model, 1, layers=[0]):
            on = streams(model, tokens)
    written = length(on[0] - off[0])
    for block in (0, 1, 2):
        difference = length(on[block] - off[block])
        assert found[0, block].difference_norm == pytest.approx(difference, rel=1e-9)
        assert found[0, block].amplification == pytest.approx(difference / written, rel=1e-9)
        assert found[0, block].relative_norm == pytest.approx(difference / length(on[block]), rel=1e-9)
    assert found[2, 2].amplification == pytest.approx(1.0, rel=1e-9)
    assert found[2, 2].cosine == pytest.approx(1.0, rel=1e-9)


def test_batches_and_padding_do_not_change_the_means() -> None:
    model = make_model("qwen3")
    tokens = make_tokens()
    inputs = padded(tokens)
    whole = to_rows(measure_blocks(model, inputs))
    apart = to_rows(measure_blocks(model, [{"input_ids": tokens[:1, :-4]}, {"input_ids": tokens[1:]}]))
    for one, other in zip(whole, apart, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == (None if other[name] is None else pytest.approx(other[name], rel=1e-9))


@pytest.mark.parametrize("mixer", ["attention", "linear", "mlp", "delta"])
def test_reads_are_shares_of_real_tokens(mixer: str) -> None:
    model = make_model("qwen3", make_config(talan_mixer=mixer, talan_writeback="gated"))
    reads = measure_reads(model, padded(make_tokens()))
    assert [item.block for item in reads] == [1, 3]
    with talan_strength(model, 0):
        off = streams(model, make_tokens())[1]
    relative = torch.linalg.vector_norm(streams(model, make_tokens())[1] - off, dim=-1) / off.norm(dim=-1)
    first = reads[0]
    torch.testing.assert_close(first.measures.relative_norm[1], relative[1], **rounding())
    assert first.measures.gates is not None
    rows = to_rows(reads)
    assert len(rows) == 2 * (2 * 21 - 4)
    table = pandas.DataFrame(rows)
    assert table[["slot_0", "slot_1", "slot_2"]].sum(axis=1).to_numpy() == pytest.approx(1.0)
    assert table["read_entropy"].between(0, 1).all()
    assert table["gate"].between(0, 1).all()
    usage = table[table["block"] == 1][["slot_0", "slot_1", "slot_2"]].mean()
    assert usage.tolist() == pytest.approx(first.slot_usage.tolist())


def test_the_model_is_left_as_it_was() -> None:
    model = make_several({"default": {}, "other": {"talan_layers": [2]}})
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with talan_strength(model, 0.5):
        halved = to_rows(measure_blocks(model, {"input_ids": make_tokens()}))
    measure_propagation(model, {"input_ids": make_tokens()})
    measure_reads(model, {"input_ids": make_tokens()})
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    whole = to_rows(measure_blocks(model, {"input_ids": make_tokens()}))
    assert halved[1]["written_norm"] == pytest.approx(whole[1]["written_norm"] / 2, rel=1e-6)


@pytest.mark.parametrize("run", [0, 1, 2])
def test_an_error_in_any_of_the_runs_leaves_the_model_as_it_was(run: int) -> None:
    model = make_model("qwen3").train()
    block = model.get_base_model().model.layers[0]
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    runs: list[None] = []

    def fail(*_: object) -> None:
        runs.append(None)
        if len(runs) == run + 1:
            raise MemoryError("out of memory")

    handle = block.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        measure_blocks(model, {"input_ids": make_tokens()})
    handle.remove()
    assert model.training and [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    assert torch.equal(logits(model.eval()), logits(make_model("qwen3")))


def test_models_that_cannot_be_measured_are_refused() -> None:
    inputs = {"input_ids": make_tokens()}
    for measure in (measure_blocks, measure_propagation, measure_reads):
        with pytest.raises(ValueError, match="no side path"):
            measure(make_base("qwen3"), inputs)
    model = make_model("qwen3")
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        measure_blocks(model, inputs)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        measure_blocks(model, inputs)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="at least one batch"):
        measure_blocks(model, [])
    with pytest.raises(ValueError, match="4 dimensions"):
        measure_blocks(model, {**inputs, "attention_mask": torch.ones(2, 1, 21, 21)})


def test_figures_show_what_was_measured() -> None:
    model = make_model("qwen3")
    inputs = padded(make_tokens())
    blocks, propagation = measure_blocks(model, inputs), measure_propagation(model, inputs)
    reads = measure_reads(model, inputs)
    stream = plot_blocks(blocks).axes[0].get_lines()[0]
    assert stream.get_ydata().tolist() == [measure.hidden_norm for measure in blocks]
    lines = plot_propagation(propagation).axes[0].get_lines()
    assert lines[0].get_ydata().tolist() == [item.amplification for item in propagation if item.source == 1]
    bars = plot_slot_usage(reads).axes[0].patches
    assert [bar.get_height() for bar in bars[:3]] == pytest.approx(reads[0].slot_usage.tolist())
    words = [f"word{place}" for place in range(21)]
    picture = plot_token_slots(reads[0], words).axes[0].images[0].get_array()
    assert picture.shape == (3, 17)
    with pytest.raises(ValueError, match="row=2"):
        plot_token_slots(reads[0], words, row=2)
    with pytest.raises(ValueError, match="1 texts for 21 tokens"):
        plot_token_slots(reads[0], ["word"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with its tokenizer, an adapter that names it, and a data file."""
    folder = tmp_path_factory.mktemp("saved")
    base = make_base("qwen3", torch.float32)
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    model = make_model("qwen3", dtype=torch.float32)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    rows = [{"text": "w3 w4 w5"}, {"text": "w7 w8 w9"}, {"text": "w2 w3"}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder


def test_analyze_writes_tables_and_pictures(saved: Path, tmp_path: Path) -> None:
    said: list[str] = []
    output = tmp_path / "new" / "folder"
    files = analyze(saved / "adapter", saved / "data.jsonl", output, batch_size=2, report=said.append)
    assert [file.name for file in files.tables] == [f"{name}.csv" for name in TABLES]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files.pictures)
    assert {"blocks.png", "propagation.png", "slot_usage.png"} <= {file.name for file in files.pictures}
    assert len(said) == 2
    tables = {file.stem: list(csv.DictReader(file.open())) for file in files.tables}
    assert [row["block"] for row in tables["blocks"]] == [str(block) for block in range(DEPTH)]
    assert {row["example"] for row in tables["tokens"]} == {"0", "1", "2"}
    model = PeftModel.from_pretrained(make_base("qwen3", torch.float32), saved / "adapter").eval()
    tokens = make_tokenizer()("w3 w4 w5", return_tensors="pt")
    expected = to_rows(measure_reads(model, {"input_ids": tokens["input_ids"]}))
    found = [float(row["slot_0"]) for row in tables["tokens"] if row["example"] == "0"]
    assert found == pytest.approx([row["slot_0"] for row in expected], rel=1e-4)
    assert [row["text"] for row in tables["tokens"] if row["example"] == "0"][:3] == ["w3", "w4", "w5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": 0}, "examples=0"),
        ({"data_file": "missing.jsonl"}, "can't be loaded"),
        ({"data_file": "empty.jsonl"}, "no rows"),
        ({"data_file": "wrong.jsonl"}, "wrong.jsonl:2"),
        ({"adapter": "lora"}, "give a TALAN adapter"),
    ],
)
def test_analyze_refuses_bad_input(saved: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    (saved / "empty.jsonl").write_text("\n")
    (saved / "wrong.jsonl").write_text('{"text": "w1"}\n{"words": 1}\n')
    (saved / "lora").mkdir(exist_ok=True)
    lora = {"peft_type": "LORA", "base_model_name_or_path": str(saved / "base")}
    (saved / "lora" / "adapter_config.json").write_text(json.dumps(lora))
    arguments = {"adapter": "adapter", "data_file": "data.jsonl", **options}
    paths = {name: saved / str(arguments.pop(name)) for name in ("adapter", "data_file")}
    with pytest.raises(ValueError, match=message):
        analyze(paths["adapter"], paths["data_file"], tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()
