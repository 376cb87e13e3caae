"""Push and pull with the real client of the hub against one on the loopback interface, and the model card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_talan import TalanConfig
from peft_talan.checkpoint.card import write_card
from peft_talan.version import INSTALL

from ..small_models import make_base, make_config, make_model, make_tokens
from .loopback_hub import Hub, running_hub

ROOT = Path(__file__).parents[2]


class Client:
    """A process with the environment of one user."""

    def __init__(self, url: str, home: Path, **environment: str) -> None:
        known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.hub_client"],
            cwd=ROOT,
            env={**known, **settings, **quiet, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self, call: str, **arguments: Any) -> Any:
        answer = self.ask(call, **arguments)
        assert "error" not in answer, answer
        return answer["result"]

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Client]:
    client = Client(hub.url, home)
    client("push_base", token="writer")
    yield client
    client.close()


def same(folder: Path, *names: str) -> bool:
    first, *others = [torch.load(folder / f"{name}.pt") for name in names]
    return all(torch.equal(first, other) for other in others)


def card_of(hub: Hub, repo: str) -> ModelCard:
    repository = hub.repositories[repo]
    return ModelCard(repository.commits[repository.branches["main"]]["README.md"].decode())


def test_pushed_and_pulled_is_what_was_trained(client: Client, hub: Hub, tmp_path: Path) -> None:
    client("push", folder=str(tmp_path), repo="user/adapter", options={}, token="writer")
    files = hub.repositories["user/adapter"].find("main")[1]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    client("pull", folder=str(tmp_path), repo="user/adapter")
    client("pull_auto", folder=str(tmp_path), repo="user/adapter")
    assert same(tmp_path, "pushed", "pulled", "auto")


def test_card_that_was_pushed(client: Client, hub: Hub, tmp_path: Path) -> None:
    client("push", folder=str(tmp_path), repo="user/card", options={"talan_mixer": "mlp"}, token="writer")
    card = card_of(hub, "user/card")
    assert card.data.library_name == "peft"
    assert {"peft", "talan", "base_model:adapter:user/base"} <= set(card.data.tags)
    assert "lora" not in card.data.tags
    assert (card.data.base_model, card.data["base_model_relation"]) == ("user/base", "adapter")
    assert card.data.pipeline_tag == "text-generation"
    for part in (
        INSTALL,
        '"user/card"',
        '"user/base"',
        '| `talan_mixer` | `"mlp"` |',
        "| side path |",
    ):
        assert part in card.text
    assert "More Information Needed" not in card.text


def test_pushed_again_without_a_change_uploads_nothing(hub: Hub, home: Path, client: Client, tmp_path: Path) -> None:
    client("push", folder=str(tmp_path), repo="user/twice", options={}, token="writer")
    commits = dict(hub.repositories["user/twice"].commits)
    hub.log.clear()
    other = Client(hub.url, home, PYTHONHASHSEED="7")
    other("push", folder=str(tmp_path), repo="user/twice", options={}, token="writer")
    other.close()
    assert hub.repositories["user/twice"].commits == commits
    assert not [request for request in hub.log if request.startswith("PUT") or "/commit/" in request]


def test_what_is_written_into_the_card_on_the_hub_stays(client: Client, hub: Hub, tmp_path: Path) -> None:
    client("push", folder=str(tmp_path), repo="user/edited", options={}, token="writer")
    repository = hub.repositories["user/edited"]
    files = dict(repository.find("main")[1])
    card = ModelCard(files["README.md"].decode())
    card.data.tags.append("mine")
    card.data.license = "mit"
    card.text = card.text.replace("# Model card", "# Sums\n\nTrained on sums.")
    repository.commit("main", {**files, "README.md": str(card).encode()})
    client("push", folder=str(tmp_path), repo="user/edited", options={"talan_slots": 2}, token="writer")
    after = card_of(hub, "user/edited")
    assert "Trained on sums." in after.text and "mine" in after.data.tags and after.data.license == "mit"
    assert "| `talan_slots` | `2` |" in after.text and after.text.count(INSTALL) == 1


def test_revisions(client: Client, hub: Hub, tmp_path: Path) -> None:
    first = client("push", folder=str(tmp_path), repo="user/revised", options={}, token="writer")
    (tmp_path / "pushed.pt").rename(tmp_path / "first.pt")
    options = {"talan_writeback": "gated"}
    client("push", folder=str(tmp_path), repo="user/revised", options=options, token="writer", revision="gated")
    for revision, name in ((first, "by commit"), ("main", "main"), ("gated", "gated")):
        client("pull", folder=str(tmp_path), repo="user/revised", name=name, revision=revision)
        # transformers would apply `revision` to the base model's repository, too.
        adapter = {"revision": revision}
        client("pull_auto", folder=str(tmp_path), repo="user/revised", name=f"auto {name}", adapter_kwargs=adapter)
    assert same(tmp_path, "first", "by commit", "main", "auto by commit", "auto main")
    assert same(tmp_path, "pushed", "gated", "auto gated") and not same(tmp_path, "first", "gated")
    assert "error" in client.ask("pull", folder=str(tmp_path), repo="user/revised", revision="none")


def test_private(client: Client, hub: Hub, tmp_path: Path) -> None:
    client("push", folder=str(tmp_path), repo="user/private", options={}, token="writer", private=True)
    client("pull", folder=str(tmp_path), repo="user/private", token="reader")
    client("pull_auto", folder=str(tmp_path), repo="user/private", token="reader")
    assert hub.repositories["user/private"].private and same(tmp_path, "pushed", "pulled", "auto")
    for token in (False, "stranger"):
        # The files of the reader lie in the cache; a stranger has another one.
        cache = str(tmp_path / f"cache {token}")
        refused = client.ask("pull", folder=str(tmp_path), repo="user/private", token=token, cache_dir=cache)
        assert "adapter_config.json" in refused["error"]
        assert "error" in client.ask("push", folder=str(tmp_path), repo="user/private", options={}, token=token)


def test_subfolders(client: Client, hub: Hub, tmp_path: Path) -> None:
    client("push_named", repo="user/several", token="writer")
    assert client("pull_second", repo="user/several", subfolder="second", token="reader")
    card = card_of(hub, "user/several")
    assert "## TALAN adapter `second`" in card.text and 'subfolder="second"' in card.text
    assert '| `talan_mixer` | `"mlp"` |' in card.text and '| `talan_mixer` | `"attention"` |' in card.text


def test_transformers_own_path(client: Client, hub: Hub, tmp_path: Path) -> None:
    client("push_injected", folder=str(tmp_path), repo="user/injected", token="writer")
    client("pull", folder=str(tmp_path), repo="user/injected")
    client("pull_auto", folder=str(tmp_path), repo="user/injected")
    assert same(tmp_path, "pushed", "pulled", "auto")
    card = card_of(hub, "user/injected")
    assert INSTALL in card.text and "| side path |" in card.text and "talan" in card.data.tags


def test_merged_model(client: Client, hub: Hub, tmp_path: Path) -> None:
    client("push_merged", folder=str(tmp_path), repo="user/merged", token="writer")
    client("pull_auto", folder=str(tmp_path), repo="user/merged")
    assert same(tmp_path, "pushed", "auto")
    card = card_of(hub, "user/merged")
    assert 'AutoModelForCausalLM.from_pretrained("user/merged")' in card.text and "PeftModel" not in card.text
    assert (card.data.base_model, card.data["base_model_relation"]) == ("user/base", "finetune")
    assert "talan" in card.data.tags and card.data.pipeline_tag == "text-generation"
    assert '| `talan_mixer` | `"attention"` |' in card.text and "| side path |" in card.text


def test_merged_model_where_an_adapter_is_expected(client: Client, hub: Hub, home: Path, tmp_path: Path) -> None:
    client("push_merged", folder=str(tmp_path), repo="user/no-adapter", token="writer", revision="kept")
    refused = "it is a merged model, not an adapter; load it, with its side path, by AutoModelForCausalLM"
    shown = client.ask("pull", folder=str(tmp_path), repo="user/no-adapter", revision="kept")
    assert f"{refused}.from_pretrained('user/no-adapter', revision='kept')" in shown["error"]
    assert refused in client.ask("load", repo="user/no-adapter", revision="kept")["error"]
    # Where the hub can't be reached, it is not asked again; its cache knows.
    gone = Client("http://127.0.0.1:1", home, HF_HUB_OFFLINE="1")
    for call in ("pull", "load"):
        options = {"folder": str(tmp_path)} if call == "pull" else {}
        assert refused in gone.ask(call, repo="user/no-adapter", revision="kept", **options)["error"]
    gone.close()


def test_plain_lora_on_a_model_that_had_talan(client: Client, hub: Hub) -> None:
    client("push_lora_after_talan", repo="user/lora", token="writer")
    assert "talan" not in str(card_of(hub, "user/lora"))


PUSHES = [("push", {"options": {}}), ("push_merged", {})]


@pytest.mark.parametrize(("call", "how"), PUSHES, ids=["adapter", "merged model"])
def test_every_argument_of_a_push_reaches_the_hub(
    call: str, how: dict[str, Any], client: Client, hub: Hub, tmp_path: Path
) -> None:
    words = {"commit_message": "Sums", "commit_description": "Of two numbers"}
    repo = f"user/arguments-{PUSHES.index((call, how))}"
    arguments = {"folder": str(tmp_path), "repo": repo, "private": True, **words}
    assert "error" in client.ask(call, **how, **arguments, token="stranger")
    assert repo not in hub.repositories
    client(call, **how, **arguments, token="writer", revision="draft")
    client(call, **how, **arguments, token="writer", create_pr=True)
    repository = hub.repositories[repo]
    assert repository.private
    assert repository.branches.keys() == {"main", "draft", "refs/pr/1"} and repository.find("main")[1] == {}
    texts = [{name: message[name] for name in ("summary", "description")} for message in repository.messages]
    assert texts == 2 * [{"summary": "Sums", "description": "Of two numbers"}]


def test_a_merged_model_that_is_pushed_as_it_is_saved(client: Client, hub: Hub, tmp_path: Path) -> None:
    options = {"by": "save_pretrained", "variant": "v1", "private": True, "commit_message": "Sums"}
    client("push_merged", folder=str(tmp_path), repo="user/merged-variant", token="writer", **options)
    repository = hub.repositories["user/merged-variant"]
    assert repository.private and "model.v1.safetensors" in repository.find("main")[1]
    assert "talan" in card_of(hub, "user/merged-variant").data.tags
    client("pull_auto", folder=str(tmp_path), repo="user/merged-variant", variant="v1", token="reader")
    assert same(tmp_path, "pushed", "auto")


def test_offline_from_the_cache(client: Client, hub: Hub, home: Path, tmp_path: Path) -> None:
    client("push", folder=str(tmp_path), repo="user/cached", options={}, token="writer")
    client("pull", folder=str(tmp_path), repo="user/cached")
    client("pull_auto", folder=str(tmp_path), repo="user/cached")
    hub.log.clear()
    offline = Client(hub.url, home, HF_HUB_OFFLINE="1")
    offline("pull", folder=str(tmp_path), repo="user/cached", name="offline")
    offline("pull_auto", folder=str(tmp_path), repo="user/cached", name="auto offline")
    offline.close()
    assert same(tmp_path, "pushed", "pulled", "auto", "offline", "auto offline")
    assert hub.log == []


def adapter(folder: Path, **options: object) -> PeftModel:
    model = make_model("qwen3", make_config(**options), torch.float32)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.save_pretrained(folder)
    return model


def test_local_card_and_a_second_save(tmp_path: Path) -> None:
    model = adapter(tmp_path)
    text = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    card = ModelCard(text)
    assert {"peft", "talan"} <= set(card.data.tags) and card.data.library_name == "peft"
    assert "- PEFT" in text and "- peft_talan" in text and "More Information Needed" not in text
    sizes = {True: 0, False: 0}
    for name, tensor in get_peft_model_state_dict(model).items():
        sizes["lora_talan_" in name] += tensor.numel()
    assert f"| side path | {sizes[True]:,} |" in text and f"| LoRA weights | {sizes[False]:,} |" in text
    for axis in fields(TalanConfig):
        assert not axis.name.startswith("talan_") or axis.name == "talan_version" or f"| `{axis.name}` |" in text


def test_what_the_user_wrote_stays(tmp_path: Path) -> None:
    written = "---\nlicense: mit\nlanguage: en\n---\n# My adapter\n\nIt adds numbers.\n\n| a | b |\n| - | - |\n"
    (tmp_path / "README.md").write_text(written)
    model = adapter(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# My adapter\n\nIt adds numbers.\n\n| a | b |\n| - | - |\n" in text and INSTALL in text
    assert ModelCard(text).data.license == "mit" and ModelCard(text).data.language == "en"
    card = ModelCard(text.replace(INSTALL, f"{INSTALL} trl"))
    card.save(tmp_path / "README.md")
    model.get_base_model().add_model_tags("mine")  # PEFT takes the card's tags from the model
    model.peft_config["default"].talan_alpha = 0.5
    model.save_pretrained(tmp_path)
    again = ModelCard.load(tmp_path / "README.md")
    assert again.text == card.text and "mine" in again.data.tags


def test_metadata_that_cannot_be_read_stays(tmp_path: Path) -> None:
    adapter(tmp_path)
    broken = "---\ntags: [\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(broken)
    with pytest.warns(UserWarning, match="left as it is"):
        write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == broken


def test_base_model_that_is_a_folder_is_not_named(tmp_path: Path) -> None:
    make_base("qwen3", torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, make_config()).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model is None
    assert not [tag for tag in card.data.tags if tag.startswith("base_model:")]


def test_configuration_alone_makes_no_card(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]


def test_card_of_trainer(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in make_tokens(4, 8).tolist()]
    options = {"use_cpu": True, "report_to": "none", "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), **options)
    model = make_model("qwen3", dtype=torch.float32)
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "| steps | 2 |" in text and "| last loss |" in text
    trainer.create_model_card()  # Trainer puts its text in the place of the whole card
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "Training hyperparameters" in card.text and card.text.count(INSTALL) == 1
    assert {"peft", "talan"} <= set(card.data.tags)


def test_card_of_trl(tmp_path: Path) -> None:
    adapter(tmp_path)
    names = {"base_model": "user/base", "model_name": "sums", "hub_model_id": "user/sums", "dataset_name": None}
    urls = {"wandb_url": None, "trackio_url": None}
    trl = pytest.importorskip("trl.trainer.utils", reason="TRL needs Python 3.11")
    trl.generate_model_card(**names, **urls, tags=["trl", "sft"], trainer_name="SFT").save(tmp_path / "README.md")
    written = ModelCard.load(tmp_path / "README.md").text
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.startswith(written.rstrip()) and INSTALL in card.text
    assert {"trl", "sft", "peft", "talan"} <= set(card.data.tags)
    assert card.data["base_model_relation"] == "adapter"
