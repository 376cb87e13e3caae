"""What the whole call is (earlier tokens, padding, samples) is read once a forward pass: masks, positions and caches.

Every right value is that of the tokens by themselves, without padding, neighbours or a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, MllamaForCausalLM, StaticCache
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from ..small_models import VOCABULARY, make_base, make_config, make_lora_config, make_model, make_tokens, rounding

PREFIX, FIRST, SECOND = 8, 5, 6


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return make_model("qwen3")


def make_cache(model: PeftModel, kind: str = "dynamic") -> Cache:
    config = model.get_base_model().config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=60)


def alone(model: PeftModel, *parts: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.cat(parts, dim=1), use_cache=False, **options).logits


def block_diagonal(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and the positions of packed samples."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return (ids.unsqueeze(0) == ids.unsqueeze(1)).tril()[None, None], positions


@torch.no_grad()
@pytest.mark.parametrize("filled_by", ["disabled adapter", "another model", "another model after a reset"])
def test_a_static_cache_that_moved_on_without_the_adapter_is_refused(model: PeftModel, filled_by: str) -> None:
    cache, tokens = make_cache(model, "static"), make_tokens()
    model(tokens[:, :6], past_key_values=cache, use_cache=True)
    if filled_by == "disabled adapter":
        with model.disable_adapter():
            model(tokens[:, 6:9], past_key_values=cache, use_cache=True)
    else:
        if "reset" in filled_by:
            cache.reset()
        make_base("qwen3")(tokens[:, 6:9], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"'default'.*empty cache"):
        model(tokens[:, 9:12], past_key_values=cache, use_cache=True)


class TupleBlock(nn.Module):
    """A block with a cache of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(
        self, hidden_states: torch.Tensor, layer_past: object = None, state: object = None, output_states: bool = False
    ) -> torch.Tensor:
        return self.linear(hidden_states)


class TupleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList([TupleBlock()])

    def forward(self, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return self.blocks[0](self.embedding(tokens), **kwargs)


def test_a_state_that_is_no_cache_is_refused() -> None:
    config = make_config(
        target_modules=["linear"], task_type=None, talan_layers=[0], talan_blocks="blocks", talan_hidden_size=16
    )
    model = get_peft_model(TupleModel(), config)
    model(make_tokens(), layer_past=None, state=(), output_states=True)
    for name in ("layer_past", "state"):
        for value in (torch.ones(2, 3), [(torch.ones(2, 3), torch.ones(2, 3))], {"keys": object()}):
            with pytest.raises(ValueError, match=rf"{name}: .*use_cache=False"):
                model(make_tokens(tokens=1), **{name: value})
            with pytest.raises(ValueError, match=rf"{name}: .*use_cache=False"):
                model.base_model.model.blocks[0](torch.ones(2, 1, 16), **{name: value})


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="withholds the cache there, from LoRA's blocks, too"
)
def test_a_model_in_training_mode_with_checkpointing_generates_as_in_evaluation() -> None:
    model = make_model("qwen3")
    expected = model.generate(input_ids=make_tokens(), max_new_tokens=6, do_sample=False)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.train().generate(input_ids=make_tokens(), max_new_tokens=6, do_sample=False), expected)


@torch.no_grad()
@pytest.mark.parametrize("decoded", [0, 2])
def test_a_later_mask_takes_tokens_out_of_the_memory(model: PeftModel, decoded: int) -> None:
    """A row that ended early was fed padding until the other one ended; the next turn masks it."""
    tokens, turn, cache = make_tokens(tokens=10), make_tokens(tokens=4, seed=7), make_cache(model)
    model(tokens[:, : 10 - decoded], attention_mask=torch.ones(2, 10 - decoded), past_key_values=cache, use_cache=True)
    for end in range(11 - decoded, 11):
        model(tokens[:, end - 1 : end], attention_mask=torch.ones(2, end), past_key_values=cache, use_cache=True)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, 7:10] = 0
    positions = mask.cumsum(-1) - 1
    logits = []
    for start, end in ((10, 13), (13, 14), (14, 15)):
        part = torch.cat([turn, turn[:, :1]], dim=1)[:, start - 10 : end - 10]
        call = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], "past_key_values": cache}
        logits.append(model(part, use_cache=True, **call).logits)
    found, turn = torch.cat(logits, dim=1), torch.cat([turn, turn[:, :1]], dim=1)
    torch.testing.assert_close(found[0], alone(model, tokens[:1], turn[:1])[0, 10:], **rounding())
    torch.testing.assert_close(found[1], alone(model, tokens[1:, :7], turn[1:])[0, 7:], **rounding())
    cache.crop(-5)
    logits = model(turn, attention_mask=mask, position_ids=positions[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(logits, found, **rounding())


@torch.no_grad()
@pytest.mark.parametrize("case", ["static cache", "one token", "unmasked"])
def test_a_later_mask_that_the_memory_can_not_follow_is_refused(model: PeftModel, case: str) -> None:
    cache, first = make_cache(model, "static" if case == "static cache" else "dynamic"), torch.ones(2, 10)
    if case == "unmasked":
        first[1, :3] = 0
    model(make_tokens(tokens=10), attention_mask=first, past_key_values=cache, use_cache=True)
    count = 1 if case == "one token" else 3
    mask = torch.ones(2, 10 + count)
    if case != "unmasked":
        mask[1, 7:10] = 0
    with pytest.raises(ValueError, match=r"attention_mask: it (un)?masks earlier tokens.*empty cache"):
        model(make_tokens(tokens=count), attention_mask=mask, past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("value", [-1e9, -1e4, -100.0, float("-inf")])
def test_additive_masks(model: PeftModel, value: float) -> None:
    tokens = make_tokens(batch=1)
    mask, positions = block_diagonal([8, 13])
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, value)
    logits = model(tokens, attention_mask=additive, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, 8:], alone(model, tokens[:, 8:]), **rounding())
    padded = torch.ones(21, 21, dtype=torch.bool).tril() & (torch.arange(21) >= 4)
    additive = torch.zeros(1, 1, 21, 21, dtype=torch.float64).masked_fill(~padded, value)
    positions = (torch.arange(21) - 4).clamp(min=0).unsqueeze(0)
    logits = model(tokens, attention_mask=additive, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, 4:], alone(model, tokens[:, 4:]), **rounding())


def test_masks_that_are_no_sequence_are_refused(model: PeftModel) -> None:
    mask = torch.ones(19, 19, dtype=torch.bool).tril()
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask.*no token sees itself"):
        model(make_tokens(tokens=19), attention_mask=~mask[None, None], use_cache=False)
    mask[PREFIX + FIRST :, PREFIX : PREFIX + FIRST] = False
    positions = torch.cat([torch.arange(PREFIX + FIRST), torch.arange(PREFIX, PREFIX + SECOND)]).unsqueeze(0)
    tokens, cache = make_tokens(batch=1, tokens=19), make_cache(model)
    with torch.no_grad(), pytest.raises(ValueError, match="share a prefix"):
        model(tokens, attention_mask=mask[None, None], position_ids=positions, use_cache=False)
    with torch.no_grad(), pytest.raises(ValueError, match="share a prefix"):
        model(tokens[:, :PREFIX], past_key_values=cache, use_cache=True)
        call = {"attention_mask": mask[None, None, PREFIX:], "position_ids": positions[:, PREFIX:]}
        model(tokens[:, PREFIX:], past_key_values=cache, use_cache=True, **call)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[21], [5, 16], [8, 13], [3, 7, 4, 7], [7, 1, 13]])
def test_packed_rows_prefilled_in_chunks(model: PeftModel, pieces: list[int]) -> None:
    tokens, cache, logits = make_tokens(batch=1), make_cache(model), []
    (mask, positions), start = block_diagonal([8, 13]), 0
    for piece in pieces:
        end = start + piece
        call = {"attention_mask": mask[:, :, start:end, :end], "position_ids": positions[:, start:end]}
        logits.append(model(tokens[:, start:end], past_key_values=cache, use_cache=True, **call).logits)
        start = end
    found = torch.cat(logits, dim=1)
    torch.testing.assert_close(found[:, :8], alone(model, tokens[:, :8]), **rounding())
    torch.testing.assert_close(found[:, 8:], alone(model, tokens[:, 8:]), **rounding())


@torch.no_grad()
def test_holes_and_padding_of_a_mask_start_nothing(model: PeftModel) -> None:
    tokens = make_tokens(batch=1, tokens=14)
    for real in ([1] * 6 + [0] * 3 + [1] * 5, [1, 1, 1] + [0] * 11):
        mask = torch.tensor([real])
        for positions in (mask.cumsum(-1) - 1, (mask.cumsum(-1) - 1) * mask):
            logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
            expected = alone(model, tokens[:, mask[0].bool()])
            torch.testing.assert_close(logits[:, mask[0].bool()], expected, **rounding())


@torch.no_grad()
def test_positions_that_jump_separate_as_attention_does(model: PeftModel) -> None:
    tokens, positions = make_tokens(batch=1, tokens=6), torch.tensor([[0, 1, 2, 7, 8, 9]])
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, :3], alone(model, tokens[:, :3]), **rounding())
    expected = alone(model, tokens[:, 3:], position_ids=positions[:, 3:])
    torch.testing.assert_close(logits[:, 3:], expected, **rounding())
    # With a cache, attention does not.
    cached = model(tokens, position_ids=positions, use_cache=True).logits
    masked = model(tokens, position_ids=positions, attention_mask=torch.ones(1, 6), use_cache=False).logits
    torch.testing.assert_close(cached, masked, **rounding())


@torch.no_grad()
def test_lengths_of_packed_samples_separate_the_memory(model: PeftModel) -> None:
    """Flash attention reads them, which is not there on a CPU: here only the side path separates."""
    tokens = make_tokens(batch=1)
    lengths = torch.tensor([0, 8, 21], dtype=torch.int32)
    seen: list[torch.Tensor] = []
    block = model.get_base_model().model.layers[1]
    handle = block.register_forward_hook(lambda *given: seen.append(given[-1]))
    call = {"position_ids": torch.arange(21).unsqueeze(0), "use_cache": False}
    model(tokens, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, **call)
    model(tokens, seq_idx=torch.tensor([[0] * 8 + [1] * 13]), **call)
    model(tokens, **call)
    handle.remove()
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[0][:, :8], seen[2][:, :8], **rounding())
    assert not torch.allclose(seen[0][:, 8:], seen[2][:, 8:])


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HYBRIDS: dict[str, dict[str, object]] = {
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mamba": {"state_size": 4},
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_local_experts": 2,
        "experts_implementation": "eager",
    },
}


@torch.no_grad()
def test_blocks_that_get_the_last_tokens_only_get_all() -> None:
    """Gemma 4 gives its blocks with shared keys what `logits_to_keep` asks for."""
    config = AutoConfig.for_model(
        "gemma4_text",
        **{**SIZES, "head_dim": 8},
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), make_config(talan_layers="all"))
    model = model.to(torch.float64).eval()
    tokens = make_tokens()
    expected = model(tokens, use_cache=False).logits
    for keep in (1, 3):
        logits = model(tokens, use_cache=False, logits_to_keep=keep).logits
        torch.testing.assert_close(logits, expected[:, -keep:], **rounding())
    generated = model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False, use_cache=False))


@torch.no_grad()
def test_blocks_whose_keys_are_those_of_an_image() -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    torch.manual_seed(0)
    base = MllamaForCausalLM(MllamaTextConfig(**sizes, cross_attention_layers=[1, 3], rope_theta=10000.0))
    for name, parameter in base.named_parameters():
        if "_gate" in name and parameter.numel() == 1:
            parameter.fill_(0.5)
    model = get_peft_model(base, make_config(talan_layers=[0, 1, 3])).to(torch.float64).eval()
    tokens, image = make_tokens(tokens=12), torch.randn(2, 7, 32, dtype=torch.float64)
    expected = model(tokens, cross_attention_states=image, use_cache=False).logits
    output = model(tokens[:, :9], cross_attention_states=image, use_cache=True)
    logits = [output.logits]
    for index in range(9, 12):
        call = {"past_key_values": output.past_key_values, "use_cache": True}
        logits.append(model(tokens[:, index : index + 1], **call).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **rounding())


def make_hybrid(kind: str) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **HYBRIDS[kind]}))
    return get_peft_model(base, make_config(talan_layers=[0, 1, -1])).to(torch.float64).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", HYBRIDS)
def test_blocks_without_keys(kind: str) -> None:
    model, tokens = make_hybrid(kind), make_tokens(tokens=12)
    expected = model(tokens, use_cache=False).logits
    logits, state = [], {}
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
        # MiniMax's own count of earlier tokens is that of its first block, which has no keys.
        positions = {} if kind == "mamba" else {"position_ids": torch.arange(start, end).unsqueeze(0)}
        output = model(tokens[:, start:end], use_cache=True, **positions, **state)
        name = "cache_params" if "cache_params" in output else "past_key_values"
        state = {name: output[name]}
        logits.append(output.logits)
    # Mamba's residual stream is float32 in every model, and so are MiniMax's decay factors.
    dtype = torch.float64 if kind == "lfm2" else torch.float32
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **rounding(dtype))
    with model.disable_adapter():
        model(tokens[:, :1], use_cache=True, **state)
    with pytest.raises(ValueError, match="empty cache"):
        model(tokens[:, :1], use_cache=True, **state)


def test_gradients_with_torchs_own_checkpoints_of_whole_blocks() -> None:
    """They run a block's hooks again in the backward pass, when the decoder's call is over."""
    model = make_model("qwen3").train()
    model.enable_input_require_grads()
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :5] = 0
    decoder, found = model.get_base_model().model, []
    for wrapped in (False, True):
        if wrapped:
            decoder.layers = nn.ModuleList([Checkpointed(block) for block in decoder.layers])
        calls = [(make_tokens(seed=2), mask), (make_tokens(seed=3), None)]
        losses = [model(tokens, attention_mask=given, labels=tokens, use_cache=False).loss for tokens, given in calls]
        (losses[0] + losses[1]).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        model.zero_grad()
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        scale = float(one.abs().max())
        torch.testing.assert_close(other, one, rtol=rounding()["rtol"], atol=rounding()["atol"] * scale)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


class Synchronisations(TorchDispatchMode):
    """Counts the operations by which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += any(name in str(func) for name in ("_local_scalar_dense", "item", "is_nonzero", "equal."))
        return func(*args, **(kwargs or {}))


def synchronisations(call: Callable[[], object]) -> int:
    with Synchronisations() as counter:
        call()
    return counter.count


MASK = (torch.arange(21) >= torch.tensor([[4], [0]])).long()
CALLS: dict[str, dict[str, torch.Tensor]] = {
    "plain": {},
    "padding": {"attention_mask": MASK},
    "no padding": {"attention_mask": torch.ones(2, 21, dtype=torch.long)},
    "packed": {"position_ids": torch.cat([torch.arange(8), torch.arange(13)]).expand(2, 21)},
    "square mask": {"attention_mask": torch.ones(21, 21, dtype=torch.bool).tril()[None, None]},
}


@pytest.mark.parametrize("training", [False, True])
def test_the_host_waits_for_the_device_as_often_as_with_lora(model: PeftModel, training: bool) -> None:
    lora, tokens = make_model("qwen3", make_lora_config()), make_tokens()
    for one in (model, lora):
        one.train(training)
    for name, call in CALLS.items():
        for use_cache in (False, True):
            counts = [
                synchronisations(lambda one=one: one(tokens, use_cache=use_cache, **call).logits.sum())  # noqa: B023
                for one in (model, lora)
            ]
            assert counts[0] == counts[1], f"{name}, use_cache={use_cache}"
    model.eval()


def test_the_host_waits_no_more_with_a_bidirectional_memory() -> None:
    config = make_config(talan_memory_scope="bidirectional", task_type="FEATURE_EXTRACTION")
    counts = []
    for one in (make_model("qwen3", config), make_model("qwen3", make_lora_config())):
        calls = [partial(one, make_tokens(), use_cache=False, **call) for call in CALLS.values()]
        counts.append([synchronisations(call) for call in calls])
    assert counts[0] == counts[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("masked", ["not", "flat", "square"])
def test_the_host_waits_no_more_in_prefill_and_decoding(model: PeftModel, kind: str, masked: str) -> None:
    tokens, counts = make_tokens(), []
    pieces = ((0, 9), (9, 17), (17, 18), (18, 19))
    for one in (model, make_model("qwen3", make_lora_config())):
        cache = make_cache(model, kind)

        def calls(one: PeftModel = one, cache: Cache = cache) -> None:
            for start, end in pieces:
                mask = {"attention_mask": MASK[:, :end]} if masked != "not" else {}
                if masked == "square":
                    keys = end if kind == "dynamic" else cache.get_mask_sizes(end - start, 0)[0]
                    causal = torch.arange(keys) <= torch.arange(start, end)[:, None]
                    padded = torch.nn.functional.pad(MASK[:, :end].bool(), (0, keys - end))
                    mask = {"attention_mask": (causal & padded[:, None])[:, None]}
                one(tokens[:, start:end], past_key_values=cache, use_cache=True, **mask)

        counts.append(synchronisations(calls))
        cache.reset()
        counts.append(synchronisations(calls))
    # On a processor, where nobody waits for it, one comparison reads a flat mask; not on other devices.
    compared = sum(end - start == 1 for start, end in pieces) if (masked, kind) == ("flat", "dynamic") else 0
    assert counts[:2] == [count + compared for count in counts[2:]]
