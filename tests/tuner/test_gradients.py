"""Invariant 6: gradients are the reference's, with and without gradient checkpointing, with forwards interleaved."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from torch import nn

from peft_talan import TalanLayer
from peft_talan.functional import reference

from ..small_models import make_config, make_model, make_tokens, rounding


def loss_of(model: PeftModel, seed: int = 2) -> torch.Tensor:
    tokens = make_tokens(tokens=70, seed=seed)
    return model(tokens, labels=tokens, attention_mask=padding()).loss


def padding() -> torch.Tensor:
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :9] = 0
    return mask


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(".talan." in name for name in found)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=rounding()["rtol"], atol=rounding()["atol"] * scale)


def by_reference(model: PeftModel) -> list[torch.utils.hooks.RemovableHandle]:
    """Run the readable equations at the side paths' places, with the same parameters."""
    handles = []
    for block in list(model.modules()):
        layer = getattr(block, "talan", None)
        if not isinstance(layer, TalanLayer):
            continue
        layer._disable_adapters = True

        def write(
            _: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor, layer: TalanLayer = layer
        ) -> torch.Tensor:
            written = reference.side_path(
                output, layer.parameters_of("default"), layer.talan_options["default"], valid=padding().bool()
            )
            return written.hidden_states

        handles.append(block.register_forward_hook(write, with_kwargs=True))
    return handles


@pytest.mark.parametrize("mixer", ["attention", "linear", "mlp", "delta"])
@pytest.mark.parametrize("writeback", ["add", "gated", "capped", "orthogonal", "relative"])
def test_gradients_of_a_whole_model_are_the_references(mixer: str, writeback: str) -> None:
    config = make_config(talan_mixer=mixer, talan_writeback=writeback, talan_grad_scale=0.5)
    model = make_model("qwen3", config).train()
    loss = loss_of(model)
    loss.backward()
    found = gradients(model)
    handles = by_reference(model)
    expected_loss = loss_of(model)
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, **rounding())
    assert_equal(found, gradients(model))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("position", ["input", "output"])
def test_gradient_checkpointing_changes_no_gradient(architecture: str, position: str, reentrant: bool) -> None:
    model = make_model(architecture, make_config(talan_position=position)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.enable_input_require_grads()
    loss_of(model).backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    loss_of(model).backward()
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("position", ["input", "output"])
def test_a_gradient_checkpoint_keeps_nothing_of_a_side_path(position: str, reentrant: bool) -> None:
    """Else the memory of long texts would grow with the number of side paths."""
    kept = []
    for layers in ([-1], "all"):
        model = make_model("qwen3", make_config(talan_layers=layers, talan_position=position)).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model)
        kept.append(sum(sizes.values()))
        loss.backward()
    assert kept[0] == kept[1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recorded_hidden_states_have_their_gradients_from_checkpoints(reentrant: bool) -> None:
    model = make_model("qwen3", make_config(talan_position="input", talan_layers="all")).train()
    model.enable_input_require_grads()

    def step() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        states = model(make_tokens(tokens=20), output_hidden_states=True).hidden_states
        sum(state.square().mean() for state in states).backward()
        return [state.detach() for state in states], gradients(model)

    expected_states, expected = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    states, found = step()
    assert all(torch.equal(one, other) for one, other in zip(states, expected_states, strict=True))
    assert_equal(found, expected)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_after_a_checkpointed_step_a_call_without_one_writes_once(backend: str | None) -> None:
    model = make_model("qwen3").train()
    tokens = make_tokens(tokens=20)
    expected = model(tokens).logits.detach()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_of(model).backward()
    torch.testing.assert_close(model(tokens).logits, expected, **rounding())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, **rounding())
    if backend is not None:
        compiled = torch.compile(model, backend=backend)
        torch.testing.assert_close(compiled(tokens).logits, expected, **rounding())


def test_a_detached_side_path_leaves_the_block_its_own_checkpoint() -> None:
    model = make_model("qwen3").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    blocks = model.base_model.model.model.layers
    before = [block._gradient_checkpointing_func for block in blocks]
    loss_of(model).backward()
    model.unload()
    assert [block._gradient_checkpointing_func for block in blocks] == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_one_backward(checkpointing: bool) -> None:
    model = make_model("qwen3").train()
    model.enable_input_require_grads()
    for seed in (2, 3):
        loss_of(model, seed).backward()
    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = [loss_of(model, seed) for seed in (2, 3)]
    (losses[0] + losses[1]).backward()
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_another_adapter_between_forward_and_backward(checkpointing: bool) -> None:
    """The LoRA weights are left out: PEFT's own LoRA recomputes with the adapter that is active then."""
    if checkpointing and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before 5.23, transformers recomputes a block's hooks, too: as LoRA, with the adapter of then")
    model = make_model("qwen3", make_config(r=0)).train()
    model.add_adapter("other", make_config(r=0, talan_mixer="linear"))
    model.to(torch.float64)
    model.enable_input_require_grads()
    loss_of(model).backward()
    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = loss_of(model)
    model.set_adapter("other")
    model.base_model.set_requires_grad("default", True)
    loss.backward()
    found = {name: gradient for name, gradient in gradients(model).items() if ".default" in name}
    assert_equal(found, expected)


def test_gradient_scale_scales_what_enters_the_side_path() -> None:
    found = {}
    for scale in (1.0, 0.25):
        model = make_model("qwen3", make_config(talan_grad_scale=scale, talan_layers=[-1])).train()
        loss_of(model).backward()
        found[scale] = gradients(model)
    last = f"layers.{len(model.base_model.model.model.layers) - 1}.talan"
    for name, gradient in found[1.0].items():
        if last in name:
            torch.testing.assert_close(found[0.25][name], 0.25 * gradient, **rounding())


def test_dropout_acts_in_training_only() -> None:
    model = make_model("qwen3", make_config(talan_dropout=0.5))
    tokens = make_tokens()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.allclose(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_train_a_step(dtype: torch.dtype) -> None:
    for autocast in (False, True):
        model = make_model("qwen3", dtype=torch.float32 if autocast else dtype).train()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = loss_of(model)
        loss.backward()
        assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
