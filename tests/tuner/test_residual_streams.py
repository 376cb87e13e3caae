"""Models whose blocks pass on several hidden states of each token, or in another order: what is read and written.

Right values are those of the readable equations, on the stream that `tuner/residual_streams.py` says is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV4Model, PreTrainedModel

from benchmarks.architectures.tiny import make_base as make_any
from benchmarks.architectures.tiny import make_config as make_any_config
from peft_talan import TalanConfig, TalanLayer, set_talan_strength
from peft_talan.functional import reference

from ..small_models import EXPERTS, make_tokens, rounding

STREAMS = 4
READ: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cpmant": lambda states: states,
    "deepseek_v4": lambda states: states.mean(2),
    "gemma3n_text": lambda states: states[0],
    "hy_v4": lambda states: states.mean(2),
    "prophetnet": lambda states: states.unflatten(1, (3, -1))[:, 0],
    "qwen4_exp_text": lambda states: states.unflatten(2, (STREAMS, -1)).mean(2),
    "xlnet": lambda states: states.transpose(0, 1),
}
"""What is read of a block's hidden states."""
EACH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cpmant": lambda states: states[None],
    "deepseek_v4": lambda states: states.movedim(2, 0),
    "gemma3n_text": lambda states: states,
    "hy_v4": lambda states: states.movedim(2, 0),
    "prophetnet": lambda states: states.unflatten(1, (3, -1)).movedim(1, 0),
    "qwen4_exp_text": lambda states: states.unflatten(2, (STREAMS, -1)).movedim(2, 0),
    "xlnet": lambda states: states.transpose(0, 1)[None],
}
"""All streams of a block's hidden states, [streams, batch, tokens, hidden_size]."""


def adapted(model_type: str, base: PreTrainedModel | None = None, **options: object) -> PeftModel:
    """A model with a side path that changes the output, and no LoRA weights."""
    base = copy.deepcopy(base) if base is not None else make_any("causal", model_type)
    dtype = base.dtype
    torch.manual_seed(1)
    config = TalanConfig(**{"r": 0, "talan_layers": [1], "init_talan_weights": False, **options})
    return get_peft_model(base, config).to(dtype).eval()


def layer_of(model: nn.Module) -> TalanLayer:
    return next(module for module in model.modules() if isinstance(module, TalanLayer))


def states_of(model: PeftModel, end: str, **inputs: torch.Tensor) -> torch.Tensor:
    """What the block with the side path passes to the next one, or receives after the side path has written."""
    found: list[torch.Tensor] = []
    block = next(module for module in model.modules() if isinstance(getattr(module, "talan", None), TalanLayer))

    def enter(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    def leave(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    if end == "input":
        handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    else:
        handle = block.register_forward_hook(leave)
    with torch.no_grad():
        model(use_cache=False, **inputs)
    handle.remove()
    return found[0]


def rounding_of(states: torch.Tensor) -> dict[str, float]:
    """The tolerance of differences of hidden states: some hundred rounding errors of the largest."""
    return {"rtol": 0.0, "atol": rounding()["atol"] * max(1.0, float(states.abs().max()))}


@pytest.mark.parametrize("end", ["input", "output"])
@pytest.mark.parametrize("model_type", READ)
def test_one_stream_is_read_and_every_stream_moves_by_the_same(model_type: str, end: str) -> None:
    model, tokens = adapted(model_type, talan_position=end), make_tokens(tokens=9)
    with model.disable_adapter():
        before = states_of(model, end, input_ids=tokens)
    after, layer = states_of(model, end, input_ids=tokens), layer_of(model)
    read = READ[model_type](before)
    parameters, options = layer.parameters_of("default"), layer.talan_options["default"]
    with torch.no_grad():
        change = reference.side_path(read, parameters, options).hidden_states - read
    assert change.abs().max() > 1e-3
    moved = EACH[model_type](after) - EACH[model_type](before)
    tolerance = rounding_of(before)
    torch.testing.assert_close(moved, change.expand_as(moved), **tolerance)
    torch.testing.assert_close(READ[model_type](after) - read, change, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", READ)
def test_a_perturbation_of_zero_changes_no_bit(model_type: str, dtype: torch.dtype) -> None:
    base, tokens = make_any("causal", model_type, dtype), make_tokens(tokens=9)
    with torch.no_grad():
        expected = base(tokens).logits
        assert torch.equal(adapted(model_type, base, init_talan_weights=True)(tokens).logits, expected)
        model = adapted(model_type, base)
        assert not torch.equal(model(tokens).logits, expected)
        set_talan_strength(model, 0.0)
        assert torch.equal(model(tokens).logits, expected)


def test_streams_in_half_precision_move_by_what_was_computed_in_single_precision() -> None:
    """A stream that is small beside the one that is read moves by a perturbation smaller than the rounding of it."""
    model, tokens = adapted("deepseek_v4", make_any("causal", "deepseek_v4", torch.bfloat16)), make_tokens(tokens=9)
    block = model.get_base_model().model.layers[1]
    offset = torch.tensor([0.0, 60.0, 60.0, 60.0], dtype=torch.bfloat16)[:, None]
    block.register_forward_hook(lambda _, __, output: output + offset, prepend=True)
    with model.disable_adapter():
        before = states_of(model, "output", input_ids=tokens)
    after, layer = states_of(model, "output", input_ids=tokens), layer_of(model)
    with torch.no_grad():
        read = before.float().mean(2)
        written = reference.side_path(read, layer.parameters_of("default"), layer.talan_options["default"])
    change = written.hidden_states - read
    expected = before[:, :, 0].float() + change
    # Half a unit of the change, and half a one of the sum.
    atol = torch.finfo(torch.bfloat16).eps * float(torch.maximum(change.abs().max(), expected.abs().max()))
    assert atol < torch.finfo(torch.bfloat16).eps * float(read.abs().max()) / 8
    torch.testing.assert_close(after[:, :, 0].float(), expected, rtol=0, atol=atol)


PIECES = [[13], [5, 8], [1, 1, 11], [7, 1, 5]]


@torch.no_grad()
@pytest.mark.parametrize("end", ["input", "output"])
@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma3n_text", "hrm_text", "hy_v4", "qwen4_exp_text"])
def test_a_cache_goes_on_from_any_split(model_type: str, end: str) -> None:
    model, tokens = adapted(model_type, talan_layers=[0, -1], talan_position=end), make_tokens(tokens=13)
    whole = model(tokens, use_cache=False).logits
    for pieces in PIECES:
        cache, logits = None, []
        for part in tokens.split(pieces, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        # Some of these models normalize in single precision.
        torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=2e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", READ)
def test_adapters_add_up_and_rows_have_their_own(model_type: str) -> None:
    model, tokens = adapted(model_type), make_tokens(tokens=9)
    torch.manual_seed(2)
    model.add_adapter("other", TalanConfig(r=0, talan_layers=[1], init_talan_weights=False))
    model.to(torch.float64)
    alone, states = [], []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(model(tokens).logits)
        states.append(states_of(model, "output", input_ids=tokens))
    mixed = model(tokens, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]), **rounding())
    with model.disable_adapter():
        base = states_of(model, "output", input_ids=tokens)
    model.base_model.set_adapter(["default", "other"])
    both = states_of(model, "output", input_ids=tokens)
    torch.testing.assert_close(both - base, sum(states) - 2 * base, **rounding_of(base))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gemma3n_text", "hrm_text", "hy_v4", "xlnet"])
def test_a_merged_model_is_saved_and_loaded_with_its_side_path(model_type: str, tmp_path: Path) -> None:
    model, tokens = adapted(model_type, make_any("causal", model_type, torch.float32)), make_tokens(tokens=9)
    expected = model(tokens).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **EXPERTS).eval()
    torch.testing.assert_close(loaded(tokens).logits, expected, **rounding(torch.float32))


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_streams(count: int) -> None:
    config = make_any_config("deepseek_v4")
    config.hc_mult = count
    torch.manual_seed(0)
    model, tokens = adapted("deepseek_v4", AutoModelForCausalLM.from_config(config, **EXPERTS)), make_tokens(tokens=9)
    with model.disable_adapter():
        base = model(tokens).logits
    logits = model(tokens).logits
    assert not torch.allclose(logits, base)
    torch.testing.assert_close(model(tokens[:, :5]).logits, logits[:, :5], rtol=2e-5, atol=2e-5)


class OwnHyperConnections(DeepseekV4Model):
    """A model of one's own, whose forward pass is none of transformers'."""

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        return super().forward(input_ids, **kwargs)


def test_streams_of_models_of_ones_own_are_refused() -> None:
    base = OwnHyperConnections(make_any_config("deepseek_v4"))
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=r"several hidden states of each token \(hc_mult=4\).*plain LoraConfig"):
        get_peft_model(base, TalanConfig(r=0))
    assert list(base.state_dict()) == names


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma3n_text", "prophetnet", "qwen4_exp_text"])
def test_streams_that_a_hook_laid_out_differently_are_refused(model_type: str) -> None:
    model = adapted(model_type, talan_layers=[2], talan_position="input")
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 4)
    blocks[1].register_forward_hook(lambda *given: _narrower(given[-1]))
    with pytest.raises(ValueError, match=r"talan_layers: a block has hidden states of shape .* lays its"):
        model(make_tokens(tokens=9))


def _narrower(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return output[..., :-1] if isinstance(output, torch.Tensor) else (output[0][..., :-1], *output[1:])


@torch.no_grad()
@pytest.mark.parametrize("padded_by", ["attention_mask", "input_mask", "perm_mask"])
def test_each_of_xlnets_masks_keeps_tokens_out_of_the_memory(padded_by: str) -> None:
    model, tokens = adapted("xlnet", talan_layers=[0]), make_tokens(tokens=9)
    real = torch.ones(2, 9)
    real[:, :3] = 0
    masks = {"attention_mask": real, "input_mask": 1 - real, "perm_mask": (1 - real)[:, None].expand(2, 9, 9)}
    logits = model(tokens, **{padded_by: masks[padded_by]}).logits
    torch.testing.assert_close(logits[:, 3:], model(tokens[:, 3:]).logits, **rounding())


@torch.no_grad()
def test_xlnets_query_stream_sees_what_was_written_in_later_blocks_only() -> None:
    tokens, target = make_tokens(tokens=9), torch.zeros(2, 1, 9)
    target[:, 0, -1] = 1
    call = {"perm_mask": target.expand(2, 9, 9), "target_mapping": target}
    base = make_any("causal", "xlnet", torch.float32)
    expected = base(tokens, **call).logits
    assert torch.equal(adapted("xlnet", base, talan_layers=[-1])(tokens, **call).logits, expected)
    model = adapted("xlnet", base, talan_layers=[0])
    logits = model(tokens, **call).logits
    assert not torch.allclose(logits, expected)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 7) % 50 + 5
    torch.testing.assert_close(model(other, **call).logits, logits, **rounding(torch.float32))


@torch.no_grad()
def test_xlnets_orders_of_tokens_are_refused() -> None:
    order = torch.zeros(2, 9, 9)
    order[:, 6:, 2:5] = 1
    with pytest.raises(ValueError, match="not all of those between them and itself"):
        adapted("xlnet", talan_layers=[0])(make_tokens(tokens=9), perm_mask=order)


@torch.no_grad()
def test_xlnet_generates_without_its_memories_of_hidden_states() -> None:
    model, tokens = adapted("xlnet", make_any("causal", "xlnet", torch.float32), talan_layers=[0]), make_tokens()
    with pytest.raises(ValueError, match=r"mems: .*pass use_mems=False"):
        model.generate(input_ids=tokens, max_new_tokens=3)
    call = {"max_new_tokens": 3, "do_sample": False, "use_mems": False}
    together = model.generate(input_ids=tokens, **call)
    assert torch.equal(model.generate(input_ids=tokens[:1], **call), together[:1])


@torch.no_grad()
def test_tokens_that_fsmts_decoder_masks_are_not_in_the_memory() -> None:
    base = make_any("sequence-to-sequence", "fsmt", torch.float32)
    model, source, tokens = adapted("fsmt", base, talan_layers=[0]), make_tokens(seed=3), make_tokens(tokens=9)
    mask, other = torch.ones(2, 9, dtype=torch.long), tokens.clone()
    mask[:, :3] = 0
    other[:, :3] = (other[:, :3] + 7) % 50 + 5
    call = {"input_ids": source, "decoder_attention_mask": mask, "use_cache": False}
    logits = [model(decoder_input_ids=ids, **call).logits[:, 3:] for ids in (tokens, other)]
    torch.testing.assert_close(*logits, **rounding(torch.float32))


@torch.no_grad()
def test_xlstms_state_carries_the_memory() -> None:
    model, tokens = adapted("xlstm", talan_layers=[0, -1]), make_tokens(tokens=13)
    whole = model(tokens, use_cache=False).logits
    state = None
    for _ in range(2):
        for pieces in PIECES:
            logits = []
            for part in tokens.split(pieces, dim=1):
                output = model(part, cache_params=state, use_cache=True)
                state = output.cache_params
                logits.append(output.logits)
            torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=2e-5, atol=2e-5)
            state.reset()


@torch.no_grad()
@pytest.mark.parametrize("filled_by", ["disabled adapter", "another model", "another model at first"])
def test_an_xlstms_state_that_moved_on_without_the_adapter_is_refused(filled_by: str) -> None:
    base, tokens = make_any("causal", "xlstm"), make_tokens(tokens=9)
    model = adapted("xlstm", base)
    first = base if filled_by == "another model at first" else model
    state = first(tokens[:, :3], use_cache=True).cache_params
    if filled_by == "disabled adapter":
        with model.disable_adapter():
            model(tokens[:, 3:6], cache_params=state, use_cache=True)
    else:
        base(tokens[:, 3:6], cache_params=state, use_cache=True)
    with pytest.raises(ValueError, match=r"'default'.*empty cache"):
        model(tokens[:, 6:], cache_params=state, use_cache=True)


@torch.no_grad()
def test_tokens_that_xlstm_gives_its_blocks_in_parts_are_refused_and_go_in_by_calls() -> None:
    base = make_any("causal", "xlstm")
    model, tokens = adapted("xlstm", base), make_tokens(tokens=base.config.max_inference_chunksize + 5)
    with pytest.raises(ValueError, match="gives this block only some of the tokens"):
        model(tokens)
    state = model(tokens[:, :-5], use_cache=True).cache_params
    logits = model(tokens[:, -5:], cache_params=state).logits
    base.config.max_inference_chunksize = 1000
    whole = adapted("xlstm", base)(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, whole[:, -5:], rtol=2e-5, atol=2e-5)
