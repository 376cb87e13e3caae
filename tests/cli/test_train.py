"""Training and comparing from the command line, on a tiny model: what is learned, told, saved and continued."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging
from trl.chat_template_utils import qwen3_chat_template

from peft_talan import TalanConfig
from peft_talan.axes import RECALL_AXES
from peft_talan.cli import main
from peft_talan.cli.console import INTERRUPTED, MISUSED
from peft_talan.cli.train import SCHEDULES
from peft_talan.sft.comparison import Job, compare
from peft_talan.sft.data import Rows, read_rows
from peft_talan.sft.intervals import Interval
from peft_talan.sft.models import load_adapter
from peft_talan.sft.prompts import encode
from peft_talan.sft.scores import score_rows

from ..offline_hub import make_tokenizer, write_conversations

Answers = Callable[[list[str | Path]], str]
Fails = Callable[..., str]

SMALL = ["--batch-size", "2", "--rank", "2"]


def write_sums(file: Path, count: int = 24) -> None:
    lines = [json.dumps({"prompt": f"{n} + {n} = ", "completion": str(2 * n)}) for n in range(count)]
    file.write_text("\n".join(lines))


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_train_learns_and_saves(saved: Path, tmp_path: Path, answers: Answers) -> None:
    write_conversations(tmp_path / "data.jsonl")
    output = tmp_path / "adapter"
    words = ["--data", tmp_path / "data.jsonl", "--output", output, "--max-steps", "2", *SMALL, "--packing"]
    axes = ["--talan-layers", "0.5", "--talan-slots", "3", "--talan-mixer", "linear"]
    shown = answers(["train", "--model", saved / "model", *words, "--json", *axes])
    assert json.loads(shown)["steps"] == 2
    assert 0 < json.loads(shown)["loss"] < 20
    config = PeftConfig.from_pretrained(output)
    assert isinstance(config, TalanConfig)
    assert (config.r, config.talan_layers, config.talan_slots, config.talan_mixer) == (2, [0.5], 3, "linear")
    writes = [tensor for key, tensor in adapter_tensors(output).items() if "_write" in key]
    assert writes
    assert all(tensor.any() for tensor in writes)
    assert json.loads((output / "prompt_form.json").read_text()) == {
        "chat": True,
        "system": None,
        "tools": None,
        "chat_template_kwargs": None,
        "generation_prompt": False,
    }


def test_train_tells_of_long_rows_and_evaluates(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sums(tmp_path / "data.jsonl")
    long_prompt, long_answer = {"prompt": "a" * 70, "completion": "b"}, {"prompt": "a", "completion": "b" * 70}
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(long_prompt)}\n{json.dumps(long_answer)}")
    write_sums(tmp_path / "eval.jsonl", 4)
    words = ["--data", tmp_path / "data.jsonl", "--eval-data", tmp_path / "eval.jsonl", "--max-length", "64"]
    run = [*words, "--output", tmp_path / "out", "--epochs", "0.2", "--eval-steps", "2", *SMALL, "--json"]
    assert main([str(word) for word in ["train", "--model", saved / "model", *run]]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["steps"] == 3
    assert 0 < result["eval_loss"] < 20
    place = tmp_path / "data.jsonl"
    assert "2 of 26 rows are longer than max_length=64 and are cut there (the longest: 72 tokens" in printed.err
    assert f"1 of these have no token of the completion left and are left out (first: {place}:25)" in printed.err
    assert "loss=" in printed.err
    assert "lr=" in printed.err
    assert json.loads((tmp_path / "out" / "prompt_form.json").read_text())["chat"] is False


@pytest.mark.parametrize("assistant_only", [False, True])
def test_rows_that_are_left_out_are_told_of_held_out_rows_too(
    assistant_only: bool, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, lengths: tuple[int, ...]) -> Path:
        texts = [{"prompt": "a" * length, "completion": "b"} for length in lengths]
        said = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            for row in texts
        ]
        rows = [{"messages": messages} for messages in said] if assistant_only else texts
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    part = "assistant" if assistant_only else "completion"
    data, short, long = write("data.jsonl", (1, 70, 2)), write("short.jsonl", (70, 1)), write("long.jsonl", (70, 80))
    words = ["--data", data, "--max-length", "64", "--output", tmp_path / "out", "--steps", "1", *SMALL]
    words = ["train", "--model", saved / "model", *words, *(["--assistant-only-loss"] if assistant_only else [])]
    assert main([str(word) for word in [*words, "--eval-data", short]]) == 0
    told = capsys.readouterr().err
    assert "1 of 3 rows are longer than max_length=64" in told
    assert f"1 of these have no token of the {part} left and are left out (first: {data}:2)" in told
    assert "1 of 2 held-out rows are longer than max_length=64" in told
    assert f"1 of these have no token of the {part} left and are left out (first: {short}:1)" in told
    assert main([str(word) for word in [*words, "--overwrite", "--eval-data", long]]) == MISUSED
    assert f"{long}: every row's first token to train on stands behind 64 tokens" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_to_the_same_weights(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sums(tmp_path / "data.jsonl")
    common = ["--model", saved / "model", "--data", tmp_path / "data.jsonl", "--steps", "20", *SMALL]

    def run(output: str, *more: str) -> int:
        capsys.readouterr()
        return main([str(word) for word in ["train", *common, "--output", tmp_path / output, *more]])

    def interrupt() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if list((tmp_path / "stopped").glob("checkpoint-*/trainer_state.json")):
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    assert run("stopped", "--save-steps", "1") == INTERRUPTED
    watcher.join()
    told = capsys.readouterr().err
    assert "--resume" in told
    assert "checkpoint-" in told
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    assert main([str(word) for word in ["train", *common, "--output", tmp_path / "stopped"]]) == 2
    assert "--resume" in capsys.readouterr().err
    assert run("stopped", "--resume") == 0
    assert run("whole") == 0
    whole = adapter_tensors(tmp_path / "whole")
    for name, tensor in adapter_tensors(tmp_path / "stopped").items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize(("scale", "rates"), [([], {2e-4, 1e-3}), (["--side-path-lr-scale", "2"], {2e-4, 4e-4})])
def test_the_side_path_has_a_learning_rate_of_its_own(
    scale: list[str], rates: set[float], saved: Path, tmp_path: Path, answers: Answers
) -> None:
    write_sums(tmp_path / "data.jsonl")
    words = ["--model", saved / "model", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", *SMALL]
    answers(["train", *words, "--steps", "1", "--save-steps", "1", *scale])
    optimizer = torch.load(tmp_path / "out" / "checkpoint-1" / "optimizer.pt", weights_only=True)
    sizes: dict[float, int] = {}
    for group in optimizer["param_groups"]:
        assert group["weight_decay"] == 0
        rate = round(group["initial_lr"], 9)
        sizes[rate] = sizes.get(rate, 0) + len(group["params"])
    assert set(sizes) == rates
    names = adapter_tensors(tmp_path / "out")
    assert sizes[max(rates)] == sum(".talan." in name for name in names)
    assert sizes[min(rates)] == sum(".talan." not in name for name in names)


def test_compare_passes_the_side_path_s_rate_on(saved: Path, tmp_path: Path, answers: Answers) -> None:
    write_sums(tmp_path / "data.jsonl")
    output = tmp_path / "out"
    words = ["--model", saved / "model", "--data", tmp_path / "data.jsonl", "--output", output, "--steps", "2", *SMALL]
    answers(["compare", *words, "--seeds", "1", "--eval-rows", "4", "--side-path-lr-scale", "0", "--device", "cpu"])
    tensors = adapter_tensors(output / "LoRA+TALAN")
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    # Where it does not learn, it writes nothing.
    assert not any(tensor.any() for name, tensor in tensors.items() if "talan_write" in name)


def test_resume_needs_a_checkpoint(saved: Path, tmp_path: Path, fails: Fails) -> None:
    write_sums(tmp_path / "data.jsonl")
    words = ["--model", saved / "model", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"]
    assert "no checkpoint" in fails(["train", *words, "--resume"])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--talan-layers", "x"], "--talan-layers"),
        (["--talan-mixer", "x"], "talan_mixer='x'"),
        (["--talan-slots", "0"], "talan_slots=0"),
        (["--learning-rate", "-1"], "--learning-rate -1.0"),
        (["--side-path-lr-scale", "-1"], "--side-path-lr-scale -1.0"),
        (["--side-path-lr-scale", "nan"], "--side-path-lr-scale nan"),
        (["--prompt-loss-weight", "-1"], "--prompt-loss-weight -1.0"),
        (["--lr-scheduler-type", "greedy"], "--lr-scheduler-type greedy: give --eval-data or --eval-rows"),
        (
            ["--lr-scheduler-type", "cosine_with_min_lr"],
            "cosine_with_min_lr: choose one of linear,",
        ),
        (["--assistant-only-loss"], "not of 'prompt-completion'"),
        (["--report-to", "x"], "--report-to x"),
        (["--report-to", "none,wandb"], "pip install wandb"),
        (["--eval-steps", "5"], "--eval-steps 5"),
        (["--eval-rows", "5", "--eval-split", "test"], "give one of them"),
        (["--eval-rows", "24"], "24 of 24 rows can't be held out"),
    ],
)
def test_train_names_bad_options(wrong: list[str], named: str, saved: Path, tmp_path: Path, fails: Fails) -> None:
    write_sums(tmp_path / "data.jsonl")
    words = ["--model", saved / "model", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"]
    assert named in fails(["train", *words, *wrong])


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_the_schedules_are_those_of_transformers_that_need_no_more(name: str) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
        works = True
    except (TypeError, ValueError):
        works = False
    assert works == (name in SCHEDULES)


def test_a_template_without_marks_of_the_assistant_is_refused_with_the_way_out(
    saved: Path, tmp_path: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    write_conversations(tmp_path / "data.jsonl")
    shutil.copytree(saved / "model", tmp_path / "model")
    words = ["--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", "--steps", "1", "--assistant-only-loss"]
    tokenizer = AutoTokenizer.from_pretrained(saved / "model")
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    tokenizer.save_pretrained(tmp_path / "model")
    error = fails(["train", "--model", tmp_path / "model", *words])
    assert "{% generation %}" in error
    assert "rows of 'prompt' and 'completion', whose completion alone is trained on" in error
    assert main([str(word) for word in ["train", "--model", saved / "model", *words, *SMALL]]) == 0


def test_compare_writes_table_picture_and_adapters(saved: Path, tmp_path: Path, answers: Answers) -> None:
    write_sums(tmp_path / "data.jsonl")
    output = tmp_path / "out"
    words = ["--model", saved / "model", "--data", tmp_path / "data.jsonl", "--output", output, "--steps", "2", *SMALL]
    shown = answers(
        ["compare", *words, "--seeds", "2", "--eval-rows", "4", "--talan-layers", "all", "--device", "cpu"]
    )
    for word in ("LoRA-matched", "LoRA+TALAN", "exact match", "plain text loss", "LoRA+TALAN minus LoRA: loss"):
        assert word in shown
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((output / "comparison.json").read_text())
    assert (found["train_rows"], found["held_out_rows"], found["steps"]) == (20, 4, 2)
    arms = {(outcome["arm"], outcome["seed"]): outcome for outcome in found["outcomes"]}
    assert len(arms) == 7
    for seed in (0, 1):
        lora, matched, talan = (arms[arm, seed] for arm in ("LoRA", "LoRA-matched", "LoRA+TALAN"))
        # The same first batch through a fresh adapter: neither half adds anything yet.
        assert lora["losses"][0] == matched["losses"][0] == talan["losses"][0]
        assert lora["trainable"] < talan["trainable"] <= matched["trainable"]
        assert matched["trainable"] - talan["trainable"] < lora["trainable"] / 2
    assert arms["LoRA", 0]["losses"][0] != arms["LoRA", 1]["losses"][0]
    assert type(PeftConfig.from_pretrained(output / "LoRA-seed-1")) is LoraConfig
    assert answers(["generate", output / "LoRA-seed-1", "1 + 1 = ", "--max-new-tokens", "3"])


def failing_job(saved: Path, folder: Path, steps: int) -> Job:
    """Rows that the base model is scored on have no completion."""
    write_sums(folder / "data.jsonl")
    rows = read_rows(str(folder / "data.jsonl"))
    wrong = Rows("wrong", [{"prompt": "1"}], ["wrong:1"])
    arguments = {"max_steps": steps, "per_device_train_batch_size": 2}
    return Job(
        str(saved / "model"), rows, wrong, "text", str(folder / "out"), 2, {}, arguments, device="cpu", threads=1
    )


def test_compare_raises_a_failure_before_the_other_runs_have_ended(saved: Path, tmp_path: Path) -> None:
    began: set[tuple[str, int]] = set()
    with pytest.raises(KeyError, match="completion"):
        # Steps that would take days.
        compare(
            failing_job(saved, tmp_path, 10**9), seeds=(0, 1), processes=2, report=lambda key, *told: began.add(key)
        )
    assert len(began) < 7
    assert not list(tmp_path.glob("out/*/adapter_model.safetensors"))


def test_compare_leaves_progress_bars_as_they_were(saved: Path, tmp_path: Path) -> None:
    job = failing_job(saved, tmp_path, 1)
    bars = (datasets.is_progress_bar_enabled, logging.is_progress_bar_enabled)
    for shown in (True, False):
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        try:
            with pytest.raises(KeyError, match="completion"):
                compare(job)
            assert [is_shown() for is_shown in bars] == [shown, shown]
        finally:
            datasets.enable_progress_bars()
            logging.enable_progress_bar()


@pytest.mark.parametrize("adapted", [False, True])
def test_scores_are_those_of_each_row_alone(adapted: bool, saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float64)
    model = PeftModel.from_pretrained(model, saved / "adapter").eval() if adapted else model.eval()
    tokenizer = AutoTokenizer.from_pretrained(saved / "model")
    rows = [{"prompt": "1 + 1 = " * many, "completion": "2 and no more" * many} for many in (2, 1, 3)]
    # The last row has no token left to score.
    asked = [encode(tokenizer, row) for row in (*rows, {"prompt": "1 " * 200, "completion": "2"})]
    scores = score_rows(model, tokenizer, asked, max_length=100)
    losses = []
    for row, given in zip(asked[:-1], scores.given, strict=True):
        prompt, completion = row.prompt, row.completion
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert given[:-1] == completion[: len(given) - 1]
        assert given[-1] == logits[len(given) - 1].argmax() != completion[len(given) - 1]
        losses.append(float(F.cross_entropy(logits, torch.tensor(completion), reduction="sum")))
    assert scores.losses == pytest.approx(losses, rel=1e-6)  # the loss is taken in float32
    assert scores.tokens == [len(row.completion) for row in asked[:-1]]
    assert not any(scores.exact)


def test_rows_that_are_not_scored_do_not_go_through_the_model(saved: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved / "model").eval(), make_tokenizer()
    shapes: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    counts: list[int] = []
    asked = [encode(tokenizer, {"prompt": "1 " * length, "completion": "2"}) for length in (3, 200, 4)]
    scores = score_rows(model, tokenizer, asked, max_length=100, report=counts.append)
    assert shapes == [(2, asked[2].length)]
    assert (len(scores.tokens), sum(counts)) == (2, 3)


@pytest.mark.parametrize("ends_texts", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_is_scored_up_to_the_token_that_ends_it_or_before(ends_texts: str, saved: Path) -> None:
    """Whatever the tokenizer ends texts with, and whatever the template writes after an answer's end."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved / "model").eval(), make_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = ends_texts, qwen3_chat_template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]
    asked = [encode(tokenizer, {"messages": messages})]
    assert score_rows(model, tokenizer, asked, ends=False).tokens == [len("bcd")]
    assert score_rows(model, tokenizer, asked).tokens == [len("bcd") + 1]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = torch.Generator().manual_seed(0)
    trials, hits, share_hits = 2000, 0, 0
    for _ in range(trials):
        interval = Interval.of_mean(torch.randn(4, generator=draw).tolist())
        hits += interval.low <= 0.0 <= interval.high
        share = Interval.of_share(int((torch.rand(50, generator=draw) < 0.1).sum()), 50)
        share_hits += share.low <= 0.1 <= share.high
    assert 0.94 < hits / trials < 0.96
    assert 0.92 < share_hits / trials < 0.99
    assert Interval.of_share(0, 20).high > 0.1


def test_train_with_a_window_saves_the_base_model_with_it_and_goes_on_from_a_checkpoint(
    saved: Path, tmp_path: Path, answers: Answers, fails: Fails
) -> None:
    write_conversations(tmp_path / "data.jsonl")
    output = tmp_path / "adapter"
    words = ["train", "--model", saved / "model", "--data", tmp_path / "data.jsonl", "--output", output, *SMALL]
    run = [*words, "--max-steps", "4", "--save-steps", "2", "--window", "8", "--json"]
    assert json.loads(answers(run))["steps"] == 4
    config = PeftConfig.from_pretrained(output)
    assert isinstance(config, TalanConfig)
    assert config.talan_layers == RECALL_AXES["talan_layers"]
    assert config.base_model_name_or_path == str(output / "base_model")
    base = AutoModelForCausalLM.from_pretrained(output / "base_model")
    assert base.config.sliding_window == 8
    whole = AutoModelForCausalLM.from_pretrained(saved / "model").state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in base.state_dict().items())
    log = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["window"] > 8
    model, tokenizer = load_adapter(str(output))
    prompt = torch.tensor([tokenizer("a" * 40)["input_ids"]])
    generated = model.generate(
        input_ids=prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    assert {layer.keys.shape[2] for layer in generated.past_key_values.layers} == {7}
    finished = adapter_tensors(output)
    shutil.rmtree(output / "checkpoint-4")
    answers([*run, "--resume"])
    assert all(torch.equal(value, finished[name]) for name, value in adapter_tensors(output).items())
    shutil.rmtree(output / "checkpoint-4")
    other = [*words, "--max-steps", "4", "--window", "16", "--resume"]
    assert "window=16: the run was started with 8" in fails(other)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("began", "resumed", "named"),
    [
        (["--window", "8"], [], "was started with --window; give the same --window"),
        ([], ["--window", "8"], "--window 8: the run in {output} was started without"),
    ],
)
def test_a_run_is_resumed_with_a_window_if_it_was_started_with_one(
    began: list[str], resumed: list[str], named: str, saved: Path, tmp_path: Path, answers: Answers, fails: Fails
) -> None:
    write_sums(tmp_path / "data.jsonl")
    output = tmp_path / "out"
    words = ["train", "--model", saved / "model", "--data", tmp_path / "data.jsonl", "--output", output, *SMALL]
    words += ["--steps", "2", "--save-steps", "1"]
    answers([*words, *began])
    before = contents(output)
    assert named.format(output=output) in fails([*words, *resumed, "--resume"])
    assert contents(output) == before


def test_a_run_whose_model_with_the_window_is_gone_is_not_resumed(
    saved: Path, tmp_path: Path, answers: Answers, fails: Fails
) -> None:
    write_sums(tmp_path / "data.jsonl")
    output = tmp_path / "out"
    words = ["train", "--model", saved / "model", "--data", tmp_path / "data.jsonl", "--output", output, *SMALL]
    words += ["--steps", "1", "--save-steps", "1", "--window", "8"]
    answers(words)
    shutil.rmtree(output / "base_model")
    assert f"{output / 'base_model'}, the model with the window, is there no more" in fails([*words, "--resume"])


@pytest.mark.parametrize("refused", ["model", "modules", "source"])
def test_overwrite_leaves_the_earlier_run_where_the_new_one_is_refused(
    refused: str, saved: Path, tmp_path: Path, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sums(tmp_path / "data.jsonl")
    output, other = tmp_path / "out", tmp_path / "gpt2"
    words = ["--data", tmp_path / "data.jsonl", "--output", output, "--steps", "2", "--save-steps", "1"]
    answers(["train", "--model", saved / "model", *words, *SMALL, "--window", "8"])
    before = contents(output)
    model, named, more = saved / "model", "lm_tail", ["--lora-target-modules", "lm_tail"]
    if refused == "model":
        AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2)).save_pretrained(other)
        AutoTokenizer.from_pretrained(saved / "model").save_pretrained(other)
        model, named, more = other, "model type 'gpt2'", []
    elif refused == "source":
        model, named, more = output / "base_model", "would replace", []
    again = ["train", "--model", model, *words, *SMALL, "--window", "16", "--overwrite", *more]
    assert main([str(word) for word in again]) == MISUSED
    assert named in capsys.readouterr().err
    assert contents(output) == before


def test_train_with_a_window_learns_the_last_answer_of_a_conversation(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "data.jsonl").write_text(f"{json.dumps({'messages': said})}\n{json.dumps({'messages': said[:1]})}\n")
    words = ["--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", "--steps", "1", *SMALL, "--window", "8"]
    assert main([str(word) for word in ["train", "--model", saved / "model", *words]]) == MISUSED
    assert "data.jsonl:2: 'messages' must end with the assistant's answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "rates", "layers", "writeback"),
    [
        ([], {3e-4}, RECALL_AXES["talan_layers"], "gated"),
        # Those without a window: given ones hold, whatever they are.
        (
            ["--learning-rate", "2e-4", "--side-path-lr-scale", "5", "--talan-layers", "1"],
            {2e-4, 1e-3},
            [1],
            "gated",
        ),
        (["--talan-layers", "every_2", "--talan-writeback", "add"], {3e-4}, "every_2", "add"),
        (["--packing"], {3e-4}, RECALL_AXES["talan_layers"], "gated"),
    ],
)
def test_a_window_has_defaults_of_its_own(
    given: list[str], rates: set[float], layers: object, writeback: str, saved: Path, tmp_path: Path, answers: Answers
) -> None:
    write_sums(tmp_path / "data.jsonl")
    words = ["--model", saved / "model", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", *SMALL]
    answers(["train", *words, "--steps", "1", "--save-steps", "1", "--window", "8", *given])
    optimizer = torch.load(tmp_path / "out" / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert {round(group["initial_lr"], 9) for group in optimizer["param_groups"]} == rates
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert isinstance(config, TalanConfig)
    assert (config.talan_layers, config.talan_writeback) == (layers, writeback)
    assert config.talan_mixer == RECALL_AXES["talan_mixer"]


def test_a_window_trains_on_prompts_with_a_small_weight(saved: Path, tmp_path: Path, answers: Answers) -> None:
    write_sums(tmp_path / "data.jsonl")
    words = [
        "--model",
        saved / "model",
        "--data",
        tmp_path / "data.jsonl",
        *SMALL,
        "--steps",
        "2",
        "--save-steps",
        "2",
    ]
    first = {}
    for name, given in (
        ("own", []),
        ("same", ["--prompt-loss-weight", "0.2"]),
        ("none", ["--prompt-loss-weight", "0"]),
    ):
        answers(["train", *words, "--window", "8", "--output", tmp_path / name, *given])
        state = json.loads((tmp_path / name / "checkpoint-2" / "trainer_state.json").read_text())
        first[name] = state["log_history"][0]
    own, same, none = (adapter_tensors(tmp_path / name) for name in ("own", "same", "none"))
    assert all(torch.equal(tensor, same[name]) for name, tensor in own.items())
    assert any(not torch.equal(tensor, none[name]) for name, tensor in own.items())
    assert first["own"]["completion_loss"] == pytest.approx(first["none"]["loss"], rel=1e-5)
    assert first["own"]["loss"] > first["own"]["completion_loss"]
