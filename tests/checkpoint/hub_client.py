"""A process that talks to the loopback hub: huggingface_hub reads its environment when it is imported.

Run as a module, it reads one line of JSON a call, {"call": name, ...}, and answers with one line.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM

from ..small_models import make_base, make_config, make_lora_config, make_model, make_tokens

BASE = "user/base"


def result_of(model: nn.Module, folder: str, name: str) -> None:
    with torch.no_grad():
        torch.save(model.eval()(make_tokens()).logits, Path(folder) / f"{name}.pt")


def make(**options: Any) -> PeftModel:
    model = make_model("qwen3", make_config(**options), torch.float32)
    model.peft_config["default"].base_model_name_or_path = BASE
    return model


def push_base(token: str) -> None:
    make_base("qwen3", torch.float32).push_to_hub(BASE, token=token)


def push(folder: str, repo: str, options: dict[str, Any], **kwargs: Any) -> str:
    model = make(**options)
    result_of(model, folder, "pushed")
    return str(model.push_to_hub(repo, **kwargs).oid)


def push_named(repo: str, token: str) -> None:
    """Adapters under names of their own go into subfolders."""
    model = make()
    model.add_adapter("second", make_config(talan_mixer="mlp"))
    model.push_to_hub(repo, token=token)


def push_injected(folder: str, repo: str, token: str) -> None:
    model = make_base("qwen3", torch.float32)
    torch.manual_seed(1)
    model.add_adapter(make_config())
    model.peft_config["default"].base_model_name_or_path = BASE
    result_of(model, folder, "pushed")
    model.push_to_hub(repo, token=token)


def push_lora_after_talan(repo: str, token: str) -> None:
    model = make_base("qwen3", torch.float32)
    model.add_adapter(make_config())
    get_peft_model_state_dict(model)
    model.delete_adapter("default")
    model.add_adapter(make_lora_config())
    model.push_to_hub(repo, token=token)


def push_merged(folder: str, repo: str, by: str = "push_to_hub", **kwargs: Any) -> None:
    merged = make().merge_and_unload()
    merged.name_or_path = BASE
    result_of(merged, folder, "pushed")
    if by == "push_to_hub":
        merged.push_to_hub(repo, **kwargs)
    else:
        merged.save_pretrained(Path(folder, "merged"), push_to_hub=True, repo_id=repo, **kwargs)


def pull(folder: str, repo: str, name: str = "pulled", **kwargs: Any) -> None:
    result_of(PeftModel.from_pretrained(make_base("qwen3", torch.float32), repo, **kwargs), folder, name)


def load(repo: str, **kwargs: Any) -> None:
    make_base("qwen3", torch.float32).load_adapter(repo, adapter_kwargs=kwargs)


def pull_second(repo: str, subfolder: str, token: str) -> bool:
    loaded = PeftModel.from_pretrained(make_base("qwen3", torch.float32), repo, token=token)
    loaded.load_adapter(repo, "other", subfolder=subfolder, token=token)
    twin = PeftModel.from_pretrained(make_base("qwen3", torch.float32), repo, subfolder=subfolder, token=token)
    pairs = get_peft_model_state_dict(loaded, adapter_name="other"), get_peft_model_state_dict(twin)
    return pairs[0].keys() == pairs[1].keys() and all(torch.equal(pairs[0][key], pairs[1][key]) for key in pairs[0])


def pull_auto(folder: str, repo: str, name: str = "auto", **kwargs: Any) -> None:
    result_of(AutoModelForCausalLM.from_pretrained(repo, **kwargs), folder, name)


def read(repo: str, file: str, token: str) -> str:
    return Path(hf_hub_download(repo, file, token=token)).read_text()


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        wanted = json.loads(line)
        call = globals()[wanted.pop("call")]
        try:
            answer = {"result": call(**wanted)}
        except Exception as error:  # noqa: BLE001 - the test looks at it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
