"""What trains: the trainability scope through PEFT's switches, stages and files; parameter groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from peft_talan import set_trainable, talan_param_groups

from ..small_models import logits, make_base, make_config, make_lora_config, make_model, make_tokens, rounding

SCOPES = {
    "joint": lambda name: "lora_" in name,
    "side_path": lambda name: ".talan." in name,
    "writeback": lambda name: "lora_talan_write" in name or "lora_talan_gate" in name,
    "low_rank": lambda name: "lora_" in name and ".talan." not in name,
}


def trained(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def meant(model: PeftModel, scope: str, adapter_name: str = "default") -> set[str]:
    return {name for name, _ in model.named_parameters() if SCOPES[scope](name) and f".{adapter_name}" in name}


@pytest.mark.parametrize("scope", SCOPES)
def test_scope_holds_through_peft_switches(scope: str) -> None:
    model = make_model("qwen3", make_config(talan_trainable=scope, talan_writeback="gated", use_dora=True))
    assert trained(model) == meant(model, scope)
    with model.disable_adapter():
        assert not trained(model)
    assert trained(model) == meant(model, scope)
    model.add_adapter("other", make_config())
    model.set_adapter("other")
    assert trained(model) == meant(model, "joint", "other")
    model.set_adapter("default")
    model.delete_adapter("other")
    assert trained(model) == meant(model, scope)


@pytest.mark.parametrize("first", SCOPES)
@pytest.mark.parametrize("second", SCOPES)
def test_scope_changes_between_stages_and_is_saved(first: str, second: str, tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(talan_trainable=first, talan_writeback="gated"))
    set_trainable(model, second)
    assert trained(model) == meant(model, second)
    model.add_adapter("other", make_config())
    model.set_adapter("other")
    model.set_adapter("default")
    assert trained(model) == meant(model, second)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(make_base("qwen3"), tmp_path, is_trainable=True)
    assert trained(loaded) == meant(loaded, second)


def test_stages_train_what_they_say() -> None:
    model = make_model("qwen3")
    tokens = make_tokens()
    for scope in ("side_path", "low_rank", "joint", "writeback"):
        set_trainable(model, scope)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(talan_param_groups(model, lr=0.1))
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed == meant(model, scope)


def test_scope_of_an_adapter_that_waits() -> None:
    model = make_model("qwen3")
    model.add_adapter("other", make_config())
    set_trainable(model, "side_path", "other")
    assert trained(model) == meant(model, "joint")
    model.set_adapter("other")
    assert trained(model) == meant(model, "side_path", "other")


def test_wrong_scopes_change_nothing() -> None:
    model = make_model("qwen3", make_config(r=0))
    before = trained(model)
    for scope, adapter_name, message in (
        ("everything", "default", r"scope='everything': choose one of 'joint'"),
        ("joint", "nobody", "adapter_name='nobody'"),
        ("low_rank", "default", "no LoRA weights"),
    ):
        with pytest.raises(ValueError, match=message):
            set_trainable(model, scope, adapter_name)
    assert trained(model) == before
    assert model.peft_config["default"].talan_trainable == "joint"


def test_groups_hold_every_trained_parameter_once() -> None:
    model = make_model("qwen3", make_config(use_dora=True, talan_writeback="gated", modules_to_save=["lm_head"]))
    groups = talan_param_groups(model, lr=0.5, side_path_lr_scale=4.0, weight_decay=0.25)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(trained(model))
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (2.0 if ".talan." in names[id(parameter)] else 0.5)
            assert group["weight_decay"] == (0.25 if parameter.dim() > 1 else 0.0)


def test_groups_refuse_what_can_not_train() -> None:
    model = make_model("qwen3")
    with pytest.raises(ValueError, match="side_path_lr_scale=-1"):
        talan_param_groups(model, lr=0.1, side_path_lr_scale=-1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        talan_param_groups(model, lr=0.1)


@pytest.mark.parametrize("by_class", [True, False])
def test_trainer_takes_the_groups(by_class: bool, tmp_path: Path) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    groups = talan_param_groups(model, lr=0.0, side_path_lr_scale=1.0)
    for group in groups:
        group["lr"] = 0.1 if ".talan." in _name_of(model, group["params"][0]) else 0.0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    given = (
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"params": groups})}
        if by_class
        else {"optimizers": (torch.optim.SGD(groups), None)}
    )
    tokens = make_tokens(batch=4).tolist()
    arguments = TrainingArguments(tmp_path, max_steps=2, use_cpu=True, report_to="none", lr_scheduler_type="constant")
    Trainer(
        model, arguments, train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}), **given
    ).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == meant(model, "side_path")


def _name_of(model: PeftModel, parameter: torch.nn.Parameter) -> str:
    return next(name for name, one in model.named_parameters() if one is parameter)


def gradients_at(scale: float) -> dict[str, torch.Tensor]:
    # A model whose norms stay in float64, and not its own loss, which rounds to float32.
    model = make_model("gpt_neox", make_config(talan_grad_scale=scale, talan_layers=[2]))
    tokens = make_tokens()
    functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_scale_reaches_the_side_path_and_what_lies_below_it() -> None:
    none, half, whole = (gradients_at(scale) for scale in (0.0, 0.5, 1.0))
    for name, gradient in whole.items():
        block = int(name.split(".layers.")[1].split(".")[0])
        if ".talan." in name:
            assert not none[name].any()
            torch.testing.assert_close(half[name], 0.5 * gradient, **rounding())
        elif block > 2:
            torch.testing.assert_close(none[name], gradient, **rounding())
        else:
            # The stream's own gradient, and what comes back through the side path, of which half.
            assert not torch.allclose(none[name], gradient, **rounding())
            torch.testing.assert_close(half[name], 0.5 * (none[name] + gradient), **rounding())


UPDATES = {
    "SGD": (torch.optim.SGD, {}, False),
    "Adam": (torch.optim.Adam, {"eps": 1e-100}, True),
    "AdamW with weight decay": (torch.optim.AdamW, {"eps": 1e-100, "weight_decay": 0.1}, True),
    "Adam with coupled weight decay": (torch.optim.Adam, {"eps": 1e-100, "weight_decay": 0.1}, False),
    "Adam with a large eps": (torch.optim.Adam, {"eps": 1e-3}, False),
}


@pytest.mark.parametrize("kind", UPDATES)
def test_adam_undoes_the_gradient_scale_of_a_side_path_below_everything(kind: str) -> None:
    """With nothing trained below the side path, what is left are eps and coupled weight decay."""
    optimizer, options, undone = UPDATES[kind]
    ends = []
    for scale in (1.0, 0.01):
        config = make_config(r=0, talan_layers=[0], talan_position="input", talan_grad_scale=scale)
        model = make_model("qwen3", config).train()
        trained_ones = [p for p in model.parameters() if p.requires_grad]
        steps = optimizer(trained_ones, lr=1e-2, **options)
        for seed in range(4):
            tokens = make_tokens(seed=seed)
            model(tokens, labels=tokens).loss.backward()
            steps.step()
            steps.zero_grad()
        ends.append([p.detach().clone() for p in trained_ones])
    equal = all(torch.allclose(one, scaled, rtol=0, atol=1e-9) for one, scaled in zip(*ends, strict=True))
    assert equal == undone


def test_gradient_scale_lowers_the_side_paths_share_in_the_norm_that_is_clipped() -> None:
    clipped = {}
    for scale in (1.0, 0.1):
        found = {name: gradient.clone() for name, gradient in gradients_at(scale).items()}
        total = torch.stack([gradient.norm() for gradient in found.values()]).norm()
        clipped[scale] = {name: gradient * (1e-3 / total) for name, gradient in found.items()}
    above = [name for name in clipped[1.0] if ".layers.3." in name]
    assert above
    for name in above:
        assert clipped[0.1][name].norm() > clipped[1.0][name].norm()


@pytest.mark.parametrize("mixer", ["attention", "mlp", "delta"])
def test_lorafa_projects_the_low_rank_half_and_trains_the_side_path(mixer: str) -> None:
    model = make_model("qwen3", make_config(talan_mixer=mixer), torch.float32).train()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = make_tokens()
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".talan." in name or "lora_B" in name}


@pytest.mark.parametrize("kind", ["loraplus", "riemannian"])
def test_pefts_optimizers_train_the_low_rank_half_as_loras_and_the_side_path_beside(kind: str) -> None:
    tokens, ends = make_tokens(), []
    for config in (make_config(init_talan_weights=True, init_lora_weights=True), make_lora_config()):
        model = make_model("qwen3", config)
        if kind == "loraplus":
            optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=8)
        else:
            optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
        model(tokens, labels=tokens).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if ".talan." in "".join(gradients):
            written = [name for name in gradients if "talan_write" in name]
            for name in written:
                torch.testing.assert_close(ends[0][name], before[name] - 0.1 * gradients[name], **rounding())
            assert written and all(gradients[name].any() for name in written)
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_peft_scales_the_low_rank_half_alone() -> None:
    """`rescale_adapter_scale` is LoRA's scaling; the side path has `talan_strength`."""
    model = make_model("qwen3")
    expected = logits(make_model("qwen3", make_config(lora_alpha=4)))
    with rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(logits(model), expected, **rounding())
