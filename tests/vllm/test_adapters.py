"""vLLM serves TALAN adapters by request, beside plain LoRA adapters, and gives each the tokens of `generate`."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from . import engines
from .adapters import ADAPTERS, PLAIN, Family

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")

SPECULATION = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "linear": {"talan_mixer": "linear", "talan_writeback": "orthogonal"},
    "capped": {"talan_writeback": "capped", "talan_cap": 0.3, "talan_layers": [0, 2]},
    "loose": {"talan_writeback": "capped", "talan_cap": 0.6, "talan_slots": 4, "talan_dim": 16},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "eager, 64 tokens a step, two slots": {
        "enforce_eager": True,
        "max_num_batched_tokens": 64,
        "max_loras": 2,
        "max_cpu_loras": 2,
    },
    "eager, 12 pages": {"enforce_eager": True, "num_gpu_blocks_override": 12},
    # On processors, vLLM gives requests without an adapter the LoRA weights of the last slot, which is empty here.
    "without an adapter": {"max_loras": len(ADAPTERS) + 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_answers_are_those_of_generate(setting: str, family: Family) -> None:
    with engines.engine(family.base, **family.options(**SETTINGS[setting])) as served:
        names = [*family.names, None] if "without" in setting else family.names
        for _ in range(2):
            cached = family.check(served, names)
        assert sum(cached) > 0
        assert (engines.preemptions(served) > 0) == ("12 pages" in setting)


def test_other_kinds_and_sliding_attention(tmp_path: Path) -> None:
    family = Family(tmp_path, "gemma3", OTHERS)
    with engines.engine(family.base, enforce_eager=True, **family.options()) as served:
        for _ in range(2):
            family.check(served, family.names)


def test_strengths(family: Family) -> None:
    """Of one adapter and one prompt each, and of a plain adapter, which has none."""
    strengths = [0.5, None, 0.0, None]
    names = ["first", "first", "first", PLAIN]
    prompt = family.prompts[2]
    folder = family.folder / "first"
    expected = [
        engines.generate(family.base, [prompt], 1.0 if strength is None else strength, folder)[0]
        for strength in strengths[:3]
    ]
    expected.append(family.answers[PLAIN][2])
    assert len({tuple(answer) for answer in expected}) == 4
    with engines.engine(family.base, enforce_eager=True, **family.options()) as served:
        for _ in range(2):
            answers, cached = engines.ask(served, [prompt] * 4, strengths, [family.request(name) for name in names])
            assert answers == expected
        # The full pages, without the last token, which is asked for again.
        assert cached == [(len(prompt) - 1) // engines.PAGE * engines.PAGE] * 4


def test_new_tensors_in_the_same_folder(family: Family, tmp_path: Path) -> None:
    """Loaded in place they are used, and what was cached is not; under a number that stands for others: refused."""
    shutil.copytree(family.folder / "first", tmp_path, dirs_exist_ok=True)
    adapter, prompts = [("first", 1, str(tmp_path))] * 2, family.prompts[:3:2]
    before = family.answers["first"][:3:2]
    adapted = engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", 7)
    with engines.engine(family.base, enforce_eager=True, **family.options(max_loras=2)) as served:
        for options in ({}, {"load_inplace": True}):
            for _ in range(2):
                assert engines.ask(served, prompts, adapters=adapter, **options)[0] == before
        adapted.save_pretrained(tmp_path)
        after = engines.generate(family.base, prompts, adapter=tmp_path)
        assert after != before
        # It was loaded as it was, and stays so.
        assert engines.ask(served, prompts, adapters=adapter)[0] == before
        for cached in (0, engines.PAGE):
            answers, found = engines.ask(served, prompts, adapters=adapter, load_inplace=True)
            assert answers == after
            assert found[0] == cached
        running = served.llm_engine
        prompt: Any = {"prompt_token_ids": prompts[0]}
        served.enqueue([prompt], engines.greedy(), lora_request=request(*adapter[0]), use_tqdm=False)
        running.step()
        for seed in (8, 9):  # which take both slots
            engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", seed).save_pretrained(tmp_path)
            running.add_lora(request(*adapter[0], load_inplace=True))
        assert 1 not in running.list_loras()
        (output,) = served.wait_for_completion(use_tqdm=False)
        assert list(output.outputs[0].token_ids) == before[0]
        running.remove_lora(1)
        with pytest.raises(ValueError, match=r"lora_int_id=1: .* holds other tensors .* load it by a new number"):
            running.add_lora(request("first", 1, tmp_path))
        new = [("first", 2, str(tmp_path))] * 2
        assert engines.ask(served, prompts, adapters=new)[0] == engines.generate(
            family.base, prompts, adapter=tmp_path
        )


def bytes_read() -> int:
    """How many bytes this process has read from files so far."""
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counted["rchar"])


def save_large(seed: int, folder: Path) -> int:
    """Write an adapter whose file is large beside all else that is read; gives the number of bytes."""
    engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", seed).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "padding": " " * 2**24})
    return file.stat().st_size


def test_an_adapter_that_is_loaded_in_place_again(family: Family, tmp_path: Path) -> None:
    """Until then its files may hold anything: requests mean what was loaded, and do not read them."""
    prompts = family.prompts[:3:2]
    adapter = [("policy", 3, str(tmp_path))] * 2
    in_place = request(*adapter[0], load_inplace=True)
    with engines.engine(family.base, enforce_eager=True, **family.options(max_loras=1)) as served:
        answers: list[list[list[int]]] = []
        for seed in (7, 8):
            size = save_large(seed, tmp_path)
            loaded = engines.generate(family.base, prompts, adapter=tmp_path)
            assert loaded not in answers
            before = bytes_read()
            # Its requests, as the OpenAI server keeps them, have the option, too.
            for options in ({"load_inplace": True}, {}) if answers else ():
                assert engines.ask(served, prompts, adapters=adapter, **options)[0] == answers[-1]
            assert bytes_read() - before < size
            before = bytes_read()
            served.llm_engine.add_lora(in_place)
            # By the engine, and by its worker before and after the read, which maps the file.
            assert 3 * size <= bytes_read() - before < 4 * size
            before = bytes_read()
            for cached, options in enumerate(({"load_inplace": True}, {})):
                found = engines.ask(served, prompts, adapters=adapter, **options)
                assert found[0] == loaded
                assert found[1][0] == cached * engines.PAGE
            assert bytes_read() - before < size
            answers.append(loaded)
        file = tmp_path / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[: size // 2])
        with pytest.raises(ValueError, match="incomplete or damaged"):
            served.llm_engine.add_lora(in_place)
        assert engines.ask(served, prompts, adapters=adapter, load_inplace=True)[0] == answers[-1]
        # vLLM drops it for another one.
        assert engines.ask(served, prompts[:1], adapters=[family.request("second")])[0] == family.answers["second"][:1]
        assert engines.ask(served, prompts, adapters=adapter, load_inplace=True)[0] == answers[-1]
        # No call has loaded this one, so its requests do, once.
        shutil.rmtree(tmp_path)
        size = save_large(9, tmp_path)
        alone = [("alone", 4, str(tmp_path))] * 2
        before = bytes_read()
        for _ in range(3):
            engines.ask(served, prompts, adapters=alone, load_inplace=True)
        assert bytes_read() - before < 4 * size


def test_a_file_that_is_written_into(family: Family, tmp_path: Path) -> None:
    """An adapter that is loaded and has no slot stays what it was."""
    folders = [tmp_path / "old", tmp_path / "new"]
    for seed, folder in enumerate(folders):
        # vLLM leaves weights as they are in the file where LoRA's scaling is 1.
        adapted = engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", seed + 7, lora_alpha=4)
        adapted.save_pretrained(folder)
    changed, other = [("changed", 9, str(folders[0]))], [family.request("second")]
    prompt = family.prompts[2:3]
    before, after = (engines.generate(family.base, prompt, adapter=folder) for folder in folders)
    assert before != after
    with engines.engine(family.base, enforce_eager=True, **family.options(max_loras=1, max_cpu_loras=2)) as served:
        assert engines.ask(served, prompt, adapters=changed)[0] == before
        old, new = (folder / "adapter_model.safetensors" for folder in folders)
        old.write_bytes(new.read_bytes())
        assert engines.ask(served, prompt, adapters=other)[0] == family.answers["second"][2:3]
        assert engines.ask(served, prompt, adapters=changed)[0] == before


def test_a_folder_that_is_written_while_it_is_read(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, be it after its tensors were looked at or after its configuration; then it is loaded as it is."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    prompt = family.prompts[2:3]
    with engines.engine(family.base, enforce_eager=True, **family.options()) as served:
        for number, (owner, name) in enumerate(
            [(LoRAModel, "from_local_checkpoint"), (PEFTHelper, "validate_legal")], 10
        ):
            folder, method = tmp_path / name, vars(owner)[name]
            original = getattr(method, "__func__", method)
            shutil.copytree(family.folder / "first", folder)

            def save_first(*args: Any, folder: Path = folder, original: Any = original, **options: Any) -> Any:
                shutil.copytree(family.folder / "second", folder, dirs_exist_ok=True)
                return original(*args, **options)

            with monkeypatch.context() as patched, pytest.raises(ValueError, match="changed while it was read"):
                patched.setattr(owner, name, classmethod(save_first) if original is not method else save_first)
                served.llm_engine.add_lora(request(name, number, folder))
            answers, _ = engines.ask(served, prompt, adapters=[(name, number, str(folder))])
            assert answers == family.answers["second"][2:3]


def test_an_adapter_that_a_step_has_read(family: Family, tmp_path: Path) -> None:
    """It stays for the request that the step began, however many are loaded before the next step."""
    held = 2
    shutil.copytree(family.folder / "first", tmp_path, dirs_exist_ok=True)
    with engines.engine(family.base, enforce_eager=True, **family.options(max_loras=held)) as served:
        prompt: Any = {"prompt_token_ids": family.prompts[0]}
        served.enqueue([prompt], engines.greedy(), lora_request=request("first", 1, tmp_path), use_tqdm=False)
        served.llm_engine.step()
        assert 1 in served.llm_engine.list_loras()
        shutil.copytree(family.folder / "second", tmp_path, dirs_exist_ok=True)
        for number in range(10, 10 + 3 * held):
            served.llm_engine.add_lora(request(f"visitor-{number}", number, family.folder / "second"))
        assert 1 not in served.llm_engine.list_loras()
        (output,) = served.wait_for_completion(use_tqdm=False)
        assert list(output.outputs[0].token_ids) == family.answers["first"][0]


def count_adapters() -> int:
    """Those that are in memory."""
    from vllm.lora.lora_model import LoRAModel

    gc.collect()
    return sum(isinstance(one, LoRAModel) for one in gc.get_objects())


def test_an_adapter_that_waiting_requests_name(family: Family, tmp_path: Path) -> None:
    """It stays as long as one of them is unfinished, be another one done or aborted, and no longer."""
    shutil.copytree(family.folder / "first", tmp_path, dirs_exist_ok=True)
    prompts, mine = family.prompts[:3], request("first", 1, tmp_path)
    options = family.options(max_num_seqs=1, max_loras=1, max_cpu_loras=1)
    with engines.engine(family.base, enforce_eager=True, **options) as served:
        running = served.llm_engine
        names = [
            served.enqueue([{"prompt_token_ids": prompt}], engines.greedy(), lora_request=mine, use_tqdm=False)[0]
            for prompt in prompts
        ]
        running.step()
        shutil.copytree(family.folder / "second", tmp_path, dirs_exist_ok=True)
        running.abort_request(names[1:2], internal=True)
        for number in (8, 9):
            running.add_lora(request(f"visitor-{number}", number, family.folder / "second"))
        outputs = served.wait_for_completion(use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == family.answers["first"][:3:2]
        # Those that began are aborted together.
        names = served.enqueue(
            [{"prompt_token_ids": prompt} for prompt in prompts], engines.greedy(), lora_request=mine, use_tqdm=False
        )
        running.step()
        running.abort_request(names, internal=True)
        assert engines.ask(served, prompts, adapters=[family.request("third")] * 3)[0] == family.answers["third"][:3]
        assert count_adapters() == 1


def test_dropped_adapters_are_gone(family: Family) -> None:
    """In memory are those that vLLM holds; until the next step also the last step's, and as many dropped ones."""
    folder, prompt, held = str(family.folder / "first"), family.prompts[:1], 2
    with engines.engine(family.base, enforce_eager=True, **family.options(max_loras=1, max_cpu_loras=held)) as served:
        for number in range(1, 4 * held):
            answers, _ = engines.ask(served, prompt, adapters=[(f"visitor-{number}", number, folder)])
            assert answers == family.answers["first"][:1]
            assert count_adapters() <= held
        for number in range(4 * held, 8 * held):
            served.llm_engine.add_lora(request(f"visitor-{number}", number, family.folder / "first"))
            assert count_adapters() <= 2 * held + 1
        engines.ask(served, prompt, adapters=[(f"visitor-{number}", number, folder)])
        assert count_adapters() == held


def request(name: str, number: int, folder: Path, **options: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folder), **options)


def configured(words: list[str]) -> Any:
    """What `vllm serve` makes of its command line."""
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()


def test_the_command_line_makes_room(family: Family) -> None:
    from peft_talan.serving.vllm.adapter_kinds import room_of

    modules = [f"{name}={family.folder / name}" for name in ("first", "second", PLAIN)]
    words = ["--model", str(family.base), "--enable-lora", "--skip-tokenizer-init"]
    config = configured([*words, "--lora-modules", *modules])
    (room,) = room_of(config)
    assert (room.blocks, room.block_list, room.kind.mixer) == ((1, 3), "model.layers", "attention")
    also = {"talan": {"adapters": [str(family.folder / "third")]}, "talan_strength": 0.5}
    config = configured([*words, "--lora-modules", *modules, "--additional-config", json.dumps(also)])
    assert [room.kind.mixer for room in room_of(config)] == ["mlp", "attention"]
    assert config.additional_config["talan_strength"] == 0.5
    config = configured([*words, "--lora-modules", modules[2]])
    assert config.scheduler_config.scheduler_cls is None
    for wrong in ([str(family.folder / "first")], {"adapters": "first"}, {"adapter": []}, None):
        also = {"talan": wrong}
        with pytest.raises(ValueError, match=r'additional_config\["talan"\]=.*: give \{"adapters"'):
            configured([*words, "--lora-modules", *modules, "--additional-config", json.dumps(also)])


def test_adapters_that_can_not_be_served(family: Family, tmp_path: Path) -> None:
    """Those that are named are refused as the engine starts, others as they are loaded; the engine serves on."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMClientError

    base = engines.CONFIGS["qwen3"]
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "elsewhere": ({"talan_layers": [0]}, "side path at block 0 .* no room; name the adapter, or one like it"),
        "wider": ({"talan_dim": 16}, "width=16.* no room; name the adapter"),
        "dora": ({"use_dora": True}, "vLLM does not yet support DoRA"),
        "whole": ({"modules_to_save": ["lm_head"]}, "Unsupported modules_to_save"),
        "large": ({"r": 16}, "LoRA rank 16 is greater than max_lora_rank 8"),
    }
    for name, (options, _) in refused.items():
        engines.adapt(engines.make_base(base), "default", **options).save_pretrained(tmp_path / name)
    with engines.engine(family.base, enforce_eager=True, **family.options()) as served:
        for number, (name, (_, message)) in enumerate(refused.items()):
            with pytest.raises(ValueError, match=message):
                served.llm_engine.add_lora(request(name, number + 10, tmp_path / name))
        # On processors, it would end vLLM's engine.
        with pytest.raises(VLLMClientError, match="prompt_logprobs: with enable_lora"):
            served.generate([{"prompt_token_ids": family.prompts[0]}], SamplingParams(prompt_logprobs=1))
        family.check(served, ["first"])

    config = json.loads((family.folder / "first" / "adapter_config.json").read_text())
    shutil.copytree(family.folder / "first", tmp_path / "later")
    config["talan_memory_scope"] = "bidirectional"
    (tmp_path / "later" / "adapter_config.json").write_text(json.dumps(config))
    named: dict[str, tuple[Any, dict[str, Any], str]] = {
        "a bidirectional memory": ([str(tmp_path / "later")], {}, "talan_memory_scope='bidirectional'"),
        "without the option": ([str(family.folder / "first")], {"enable_lora": False}, "need enable_lora"),
        "no list": (str(family.folder / "first"), {}, "give .*adapters"),
        "some modules": (
            [str(family.folder / "first")],
            {"lora_target_modules": ["q_proj"]},
            "lora_target_modules=.* start it without",
        ),
        "speculation": ([str(family.folder / "first")], {"speculative_config": SPECULATION}, "speculative_config: "),
    }
    for adapters, options, message in named.values():
        given = family.options(additional_config={"talan": {"adapters": adapters}}, **options)
        with pytest.raises(ValueError, match=message):
            EngineArgs(**engines.engine_options(family.base, **given)).create_engine_config()
