"""What vLLM does to a request or a model beside generating once: the memory is right there, too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_talan import set_talan_strength

from ..offline_hub import make_tokenizer
from . import engines
from .adapters import Family

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged")
    engines.save_model(path, "qwen3")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_probabilities_of_a_prompt_from_a_warm_cache(folder: Path, model: Any) -> None:
    """vLLM computes such a prompt again."""
    from vllm import SamplingParams

    prompts = engines.make_prompts()[1:4]
    expected = [model(torch.tensor([prompt])).logits[0].argmax(-1).tolist() for prompt in prompts]
    parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    with engines.engine(folder, enforce_eager=True, max_num_batched_tokens=64) as served:
        engines.ask(served, prompts)
        for _ in range(2):
            outputs = served.generate([{"prompt_token_ids": one} for one in prompts], parameters, use_tqdm=False)
            for output, tokens in zip(outputs, expected, strict=True):
                likeliest = [
                    max(found, key=lambda token: found[token].logprob) for found in output.prompt_logprobs[1:]
                ]
                assert likeliest == tokens[:-1]


def test_a_prompt_in_pieces(folder: Path) -> None:
    """The session goes on from the token before the last sampled one, which it drops; its pages are shared."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    pieces = [prompt[: engines.PAGE + 9] for prompt in engines.make_prompts()[1:4]]
    names = ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
    parameters = SamplingParams(temperature=0.0, max_tokens=5)
    spoken: list[int] = []
    with engines.engine(folder, enforce_eager=True, max_num_batched_tokens=64) as served:
        core = served.llm_engine.engine_core
        for piece in [*pieces, None]:
            core.add_request(
                EngineCoreRequest(
                    request_id="0",
                    prompt_token_ids=piece or [0],
                    sampling_params=parameters,
                    arrival_time=0.0,
                    resumable=piece is not None,
                    **dict.fromkeys(names),
                )
            )
            if piece is None:  # the end of the session
                break
            answer: list[int] = []
            while len(answer) < 5:
                answer += [token for output in core.get_output().outputs for token in output.new_token_ids]
            assert answer == engines.generate(folder, [spoken + piece])[0][:5]
            spoken += [*piece, *answer[:-1]]
        whole = [spoken + engines.make_prompts()[0]]
        assert engines.ask(served, whole) == (
            engines.generate(folder, whole),
            [len(spoken) // engines.PAGE * engines.PAGE],
        )


@torch.no_grad()
def test_embeddings(folder: Path, model: Any) -> None:
    """A pooling runner, which gives no tokens."""
    prompts = engines.make_prompts()[1:4]
    states = [model.model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts]
    make_tokenizer().save_pretrained(folder)
    options = {"runner": "pooling", "convert": "embed", "max_num_batched_tokens": 64, "skip_tokenizer_init": False}
    with engines.engine(folder, enforce_eager=True, **options) as served:
        for _ in range(2):
            outputs = served.embed([{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False)
            found = torch.tensor([output.outputs.embedding for output in outputs])
            torch.testing.assert_close(found, F.normalize(torch.stack(states), dim=-1))


def save_classifier(folder: Path, labels: int) -> Any:
    """Write a classifier whose head is trained with the adapter, and merged; gives transformers' model of it."""
    config = copy.deepcopy(engines.CONFIGS["qwen3"])
    config.num_labels, config.vocab_size = labels, len(make_tokenizer())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    adapted = engines.adapt(base, "default", task_type="SEQ_CLS", talan_alpha=2.0)
    adapted.merge_and_unload().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(classifier: Any, prompts: list[list[int]]) -> torch.Tensor:
    return torch.cat([classifier(torch.tensor([prompt])).logits for prompt in prompts])


CLASSIFY = {"runner": "pooling", "convert": "classify", "max_num_batched_tokens": 64, "skip_tokenizer_init": False}


def test_classes(tmp_path: Path) -> None:
    """A pooling runner with a head."""
    prompts = engines.make_prompts()[1:4]
    classifier = save_classifier(tmp_path, 3)
    expected = logits_of(classifier, prompts).softmax(-1)
    set_talan_strength(classifier, 0.0)
    assert (expected - logits_of(classifier, prompts).softmax(-1)).abs().max() > 0.01
    with engines.engine(tmp_path, enforce_eager=True, **CLASSIFY) as served:
        for _ in range(2):
            outputs = served.classify([{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False)
            torch.testing.assert_close(torch.tensor([output.outputs.probs for output in outputs]), expected)


def test_scores_of_pairs(tmp_path: Path) -> None:
    """Classes of one label; vLLM joins the two texts of a pair."""
    query = "Which of these two texts is about the sea? "
    texts = ["Waves break on the shore, and the tide comes in twice a day.", "Bread is baked from flour."]
    prompts = [make_tokenizer()(query + text)["input_ids"] for text in texts]
    classifier = save_classifier(tmp_path, 1)
    expected = logits_of(classifier, prompts).sigmoid().squeeze(-1)
    set_talan_strength(classifier, 0.0)
    assert (expected - logits_of(classifier, prompts).sigmoid().squeeze(-1)).abs().max() > 0.01
    with engines.engine(tmp_path, enforce_eager=True, **CLASSIFY) as served:
        for _ in range(2):
            outputs = served.score(query, texts, use_tqdm=False)
            torch.testing.assert_close(torch.tensor([output.outputs.score for output in outputs]), expected)


def lose_weights(worker: Any) -> None:
    """What level 2 does to a GPU's memory, where vLLM brings back buffers alone."""
    for module in worker.get_model().modules():
        for parameter in module.parameters(recurse=False):
            parameter.data.fill_(torch.nan)
        for name in ("lora_a_stacked", "lora_b_stacked"):
            for stacked in getattr(module, name, ()):
                stacked.fill_(torch.nan)


def test_sleep_at_level_2(family: Family) -> None:
    """Processors' memory stays where it is, so it is overwritten here."""
    with engines.engine(family.base, enforce_eager=True, **family.options()) as served:
        family.check(served, family.names)
        served.sleep(level=2)
        served.collective_rpc(lose_weights)
        served.wake_up()
        served.collective_rpc("reload_weights")
        family.check(served, family.names)


def test_requests_that_start_again(family: Family) -> None:
    """From their first token, in the middle of their answers: all pages are taken away."""
    from vllm.lora.request import LoRARequest

    names = [family.names[number % len(family.names)] for number in range(len(family.prompts))]
    adapters = [LoRARequest(*request) for request in map(family.request, names) if request is not None]
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in family.prompts]
    with engines.engine(family.base, enforce_eager=True, **family.options()) as served:
        served.enqueue(prompts, engines.greedy(), lora_request=adapters, use_tqdm=False)
        for _ in range(2):
            assert not any(output.finished for output in served.llm_engine.step())
        assert served.reset_prefix_cache(reset_running_requests=True)
        outputs = served.wait_for_completion(use_tqdm=False)
        assert engines.preemptions(served) == len(prompts)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    assert answers == [family.answers[name][number] for number, name in enumerate(names)]
