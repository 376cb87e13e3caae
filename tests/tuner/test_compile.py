"""torch.compile: no graph break, equal results, no compilation from token to token; as the matched LoRA, so this."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from peft import PeftModel
from transformers import Cache, DynamicCache, StaticCache

from ..small_models import make_config, make_lora_config, make_model, make_tokens, rounding

NEW_TOKENS = 6


def make_shallow_model(adapter: str = "talan", blocks: int = 2, **options: object) -> PeftModel:
    """Few blocks: compiling takes its time for each."""
    low_rank = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    talan = make_config(talan_layers=[-1], **low_rank, **options)
    return make_model("llama", talan if adapter == "talan" else make_lora_config(**low_rank), blocks=blocks)


class Graphs:
    """A backend that counts the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def padded() -> dict[str, torch.Tensor]:
    """Two rows; the first begins with padding."""
    tokens = make_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize(
    "options", [{}, {"talan_mixer": "mlp", "talan_writeback": "gated", "talan_position": "input"}]
)
def test_a_training_step_has_one_graph_and_equal_gradients(options: dict[str, object]) -> None:
    model = make_shallow_model(**options).train()
    inputs = padded()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = run(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        found.append({"loss": loss} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, **rounding())


def test_packed_samples_and_inference_with_and_without_cache() -> None:
    model = make_shallow_model(blocks=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = make_tokens(batch=1)
    positions = torch.cat([torch.arange(9), torch.arange(12)]).unsqueeze(0)
    with torch.no_grad():
        for use_cache in (False, True):
            for inputs in (padded(), {"input_ids": tokens, "position_ids": positions}):
                found = compiled(**inputs, use_cache=use_cache).logits
                torch.testing.assert_close(found, model(**inputs, use_cache=use_cache).logits, **rounding())


def make_cache(kind: str, model: PeftModel) -> Cache:
    config = model.get_base_model().config
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "without config":
        return DynamicCache()
    cache = StaticCache(config=config, max_cache_len=40)
    if kind == "static, made before":
        cache.early_initialization(2, config.num_key_value_heads, config.head_dim, torch.float64, torch.device("cpu"))
    return cache


def graphs_of_decoding(model: PeftModel, kind: str) -> list[int]:
    """Decode twice by a compiled forward; how many graphs there are after each token."""
    torch._dynamo.reset()
    graphs, counts, inputs = Graphs(), [], padded()
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(**inputs, position_ids=positions, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for _ in range(2):
        cache, logits = make_cache(kind, model), []
        for start, end in [(0, 17), *((index, index + 1) for index in range(17, 21))]:
            call = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            logits.append(compiled(tokens[:, start:end], **call, past_key_values=cache, use_cache=True).logits)
            counts.append(graphs.count)
        real = mask.bool()
        torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], **rounding())
    return counts


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static, made before", "without config"])
def test_decoding_compiles_as_often_as_lora_does(kind: str) -> None:
    talan, lora = make_shallow_model(blocks=1), make_shallow_model("lora", blocks=1)
    assert graphs_of_decoding(talan, kind) == graphs_of_decoding(lora, kind)


def test_generation_with_a_static_cache_compiles_the_prompt_and_one_token() -> None:
    model = make_shallow_model()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = model.generate(**padded(), **options)
    base, graphs = model.get_base_model(), Graphs()
    base.forward = torch.compile(base.forward, fullgraph=True, backend=graphs)
    for _ in range(2):
        assert torch.equal(model.generate(**padded(), **options, cache_implementation="static"), expected)
        assert graphs.count == 2


@torch.no_grad()
def test_a_compiled_token_goes_on_from_an_eager_prompt_and_back() -> None:
    model = make_shallow_model(blocks=1)
    tokens = make_tokens(batch=1)
    expected = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for kind in ("static", "dynamic"):
        cache, logits = make_cache(kind, model), []
        for index, part in enumerate(tokens.split([12, 1, 1, 1, 1, 1, 1, 1, 1, 1], dim=1)):
            run = compiled if index in (2, 3, 6) else model
            logits.append(run(part, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **rounding())


@torch.no_grad()
def test_compiled_decoding_refuses_a_cache_that_it_has_not_seen() -> None:
    model = make_shallow_model(blocks=1)
    cache, tokens = make_cache("static", model), make_tokens()
    with model.disable_adapter():
        model(tokens, past_key_values=cache, use_cache=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="start from an empty cache"):
        compiled(tokens[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_inductor_decodes_the_same() -> None:
    model = make_shallow_model(blocks=1)
    tokens = make_tokens(batch=1)
    expected = model(tokens, use_cache=False).logits[:, 19:]
    cache, logits = make_cache("static", model), []
    model(tokens[:, :19], past_key_values=cache, use_cache=True)
    compiled = torch.compile(model, fullgraph=True)
    for token in tokens[:, 19:].split(1, dim=1):
        logits.append(compiled(token, past_key_values=cache, use_cache=True).logits)
    # Rotary embeddings are float32 in every model, and inductor's cosine rounds otherwise: as far for plain LoRA.
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **rounding(torch.float32))


class Logits(torch.nn.Module):
    """What `torch.export` takes: tensors in, a tensor out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("options", [{}, {"talan_position": "input", "talan_mixer": "mlp"}], ids=["output", "input"])
def test_an_exported_graph_takes_any_length(options: dict[str, str]) -> None:
    model = Logits(make_shallow_model(**options))
    lengths = {1: torch.export.Dim("tokens", min=3, max=200)}
    tokens = make_tokens(tokens=13)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    exported = torch.export.export(model, (tokens, mask), dynamic_shapes=(lengths, lengths), strict=False).module()
    for other in (tokens, make_tokens(tokens=70)):
        mask = torch.ones_like(other)
        mask[0, :4] = 0
        torch.testing.assert_close(exported(other, mask), model(other, mask), **rounding())


def test_an_exported_graph_of_the_delta_mixer_has_one_length() -> None:
    model = Logits(make_shallow_model(talan_mixer="delta"))
    tokens = make_tokens(tokens=13)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    exported = torch.export.export(model, (tokens, mask), strict=False).module()
    torch.testing.assert_close(exported(tokens, mask), model(tokens, mask), **rounding())
