"""Pushing an exported folder, by huggingface_hub's own client, to a hub on loopback; and loading it from there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.hf.push import describe, plan_push
from tests.checkpoint.exported_models import IMAGES, export, logits, make_model
from tests.checkpoint.fake_hub import FakeHub, running_hub

CARD = {"name": "tiny", "dataset": "digits", "metrics": {"top1": 0.9, "top1_ci": [0.88, 0.92]}}
# Pushes argv[1] for every [repository, private, revision, token] of argv[2] and prints what became of each.
PUSH = """
import json, os, sys
from pathlib import Path
from m2mkd_ds.checkpoint.hf.push import plan_push, push
for repo, private, revision, token in json.loads(sys.argv[2]):
    os.environ["HF_TOKEN"] = token
    try:
        answer = ["done", push(plan_push(Path(sys.argv[1]), repo, private=private, revision=revision))]
    except (ValueError, RuntimeError) as err:
        answer = [type(err).__name__, str(err)]
    print("ANSWER" + json.dumps(answer), flush=True)
"""
# Loads repository argv[1] at revision argv[2] in a process that has no m2mkd_ds.
LOAD = """
import json, sys
import torch
from huggingface_hub import snapshot_download
from transformers import AutoImageProcessor, AutoModelForImageClassification
repo, revision, images, out = sys.argv[1:]
folder = snapshot_download(repo, revision=revision)
model = AutoModelForImageClassification.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
with torch.no_grad():
    torch.save({"logits": model(torch.load(images, weights_only=True)).logits}, out)
assert "m2mkd_ds" not in sys.modules
print("FOLDER" + folder + "|" + type(processor).__name__)
"""


def child(code: str, hub_url: str, home: Path, *arguments: str, isolated: bool = False, **environment: str) -> str:
    """Run `code` against the hub with a fresh home, and return what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    flags = ["-I"] if isolated else []
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments], env=env, cwd=home.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if code == PUSH:  # stderr is no terminal here: no bar of the hub's library, no cursor movements, no blanked lines
        assert not any(mark in done.stderr for mark in ("%|", "\x1b", "   ")), done.stderr
    return done.stdout


def pushes(folder: Path, hub_url: str, home: Path, *wanted: tuple[str, bool, str, str], **environment: str) -> list[list[str]]:
    output = child(PUSH, hub_url, home, str(folder), json.dumps(wanted), **environment)
    return [json.loads(line.removeprefix("ANSWER")) for line in output.splitlines() if line.startswith("ANSWER")]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Several shards, so that several large files are sent."""
    return export(make_model(), tmp_path / "out", card=CARD, max_shard_size="60KB")


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_push_is_one_commit_and_loads_with_equal_bits_from_there(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    ((how, address),) = pushes(folder, hub.url, tmp_path / "home", ("me/vmoe", True, "main", "hf_token_of_me"))
    assert how == "done"
    repo = hub.repos["me/vmoe"]
    assert repo.private and [c.summary for c in repo.branches["main"]] == ["initial commit", "Export of m2mkd_ds"]
    commit = repo.branches["main"][-1]
    assert address == f"{hub.url}/me/vmoe/commit/{commit.oid}"
    assert {name: data for name, data in commit.files.items() if name != ".gitattributes"} == content(folder)
    assert commit.large == {p.name for p in folder.glob("*.safetensors")} and len(commit.large) > 2
    assert sum(method == "PUT" for method, _ in hub.requests) == len(commit.large)

    torch.save(IMAGES, tmp_path / "images.pt")
    arguments = ("me/vmoe", commit.oid, str(tmp_path / "images.pt"), str(tmp_path / "logits.pt"))
    printed = child(LOAD, hub.url, tmp_path / "other_home", *arguments, isolated=True, HF_TOKEN="hf_token_of_me")
    downloaded, processor = printed.partition("FOLDER")[2].strip().split("|")
    assert {name: data for name, data in content(Path(downloaded)).items() if name != ".gitattributes"} == content(folder)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True)["logits"], logits(make_model()))
    assert processor == "VMoEImageProcessor"


def test_a_second_export_replaces_the_first_and_leaves_the_owners_files(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    me = "hf_token_of_me"
    assert pushes(folder, hub.url, tmp_path / "home", ("me/vmoe", False, "main", me))[0][0] == "done"
    shards = {p.name for p in folder.glob("*.safetensors")}
    first = hub.repos["me/vmoe"].branches["main"][-1]
    first.files["figure.png"] = b"the owner's"
    whole = export(make_model(), tmp_path / "whole", card=CARD)
    answers = pushes(whole, hub.url, tmp_path / "home", ("me/vmoe", False, "main", me), ("me/vmoe", False, "whole", me))
    assert [how for how, _ in answers] == ["done", "done"]
    commits = hub.repos["me/vmoe"].branches["main"]
    assert len(commits) == 3 and set(commits[-1].files) == set(content(whole)) | {".gitattributes", "figure.png"}
    assert not shards & set(commits[-1].files) and shards <= set(first.files)
    # The other branch was made from main, where the files were the same already.
    assert hub.repos["me/vmoe"].branches["whole"][-1].files == commits[-1].files


def test_what_the_user_can_mend_is_one_sentence(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.add_repo("me/bert", {"config.json": b'{"model_type": "bert"}', "pytorch_model.bin": b"1"})
    hub.add_repo("me/data", {"train.csv": b"1,2"})
    hub.add_repo("me/public", {"README.md": b"hello"})
    hub.add_repo("you/vmoe", {"README.md": b"hello"})
    me = "hf_token_of_me"
    before = {name: dict(repo.branches) for name, repo in hub.repos.items()}
    answers = pushes(
        folder, hub.url, tmp_path / "home",
        ("me/bert", False, "main", me), ("me/data", False, "main", me), ("me/public", True, "main", me), ("you/vmoe", False, "main", me),
        ("you/new", False, "main", me), ("me/vmoe", False, "main", "hf_wrong"), ("me/vmoe", False, "main", ""),
    )  # fmt: skip
    expected = [
        "me/bert exists and holds something else (2 files, a model of type 'bert'); push under another name",
        "me/data exists and holds something else (1 files, no config.json); push under another name",
        "me/public exists and is public, and --private was given; make it private on the hub, or push elsewhere",
        "you/vmoe: the token may not write there (403); push under your own name, or use a token with the right to",
        "you/new: the token may not write there (403); push under your own name, or use a token with the right to",
        "me/vmoe: the hub does not know the token (401); log in again with `hf auth login`, or set HF_TOKEN",
        "there is no token of the Hugging Face hub on this machine; run `hf auth login`, or set HF_TOKEN",
    ]
    assert answers == [["ValueError", sentence] for sentence in expected]
    assert {name: dict(repo.branches) for name, repo in hub.repos.items()} == before and not hub.objects


def test_a_damaged_upload_is_not_committed_and_a_damaged_commit_is_found(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.damage_uploads = True
    ((kind, text),) = pushes(folder, hub.url, tmp_path / "home", ("me/vmoe", False, "main", "hf_token_of_me"))
    assert kind == "HubError" and text.startswith("me/vmoe: the hub answered 400 (") and text.endswith("; push again later")
    assert len(hub.repos["me/vmoe"].branches["main"]) == 1
    hub.damage_uploads, hub.damage_commits = False, True
    ((kind, text),) = pushes(folder, hub.url, tmp_path / "home", ("me/vmoe", False, "main", "hf_token_of_me"))
    commit = hub.repos["me/vmoe"].branches["main"][-1].oid
    assert (kind, text) == ("HubError", f"me/vmoe: the hub holds another README.md than was sent (commit {commit}); push it again")


def test_a_connection_that_ends_before_the_commit_leaves_no_commit(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.hang_up_at = "/commit/"
    ((kind, text),) = pushes(folder, hub.url, tmp_path / "home", ("me/vmoe", False, "main", "hf_token_of_me"))
    assert kind == "HubError" and text.startswith(f"{hub.url} cannot be reached (") and "\n" not in text
    assert len(hub.repos["me/vmoe"].branches["main"]) == 1
    hub.hang_up_at = ""
    sent = len([1 for method, _ in hub.requests if method == "PUT"])
    assert pushes(folder, hub.url, tmp_path / "home", ("me/vmoe", False, "main", "hf_token_of_me"))[0][0] == "done"
    assert len([1 for method, _ in hub.requests if method == "PUT"]) == sent  # what had arrived is not sent twice


def test_no_network_and_offline_mode_are_said_so(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        wanted = ("me/vmoe", False, "main", "hf_token_of_me")
        ((kind, text),) = pushes(folder, nobody, tmp_path / "home", wanted)
        assert kind == "HubError" and text.startswith(f"{nobody} cannot be reached (") and text.endswith("; push again when it can")
        offline = pushes(folder, nobody, tmp_path / "home", wanted, HF_HUB_OFFLINE="1")
    assert offline == [["ValueError", "HF_HUB_OFFLINE is set, so nothing was sent; unset it to push"]]


def test_a_changed_folder_a_foreign_folder_and_a_bad_name_are_refused_before_anything_is_sent(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--push is 'vmoe'; expected USER/NAME"):
        plan_push(folder, "vmoe", private=False)
    with pytest.raises(ValueError, match="me/a b"):
        plan_push(folder, "me/a b", private=False)
    with pytest.raises(StoreError, match=r"holds no manifest.json; only a folder that `m2mkd export` wrote is pushed"):
        plan_push(tmp_path, "me/vmoe", private=False)
    (folder / "README.md").write_text("other")
    with pytest.raises(StoreError, match=r"README.md: changed since the export"):
        plan_push(folder, "me/vmoe", private=False)


def test_the_description_names_every_file_and_what_is_left_out(folder: Path) -> None:
    import hashlib

    (folder / "notes.txt").write_text("mine")
    plan = plan_push(folder, "me/vmoe", private=True, revision="v2")
    assert {file.name for file in plan.files} == set(content(folder)) - {"notes.txt"}
    lines = describe(plan).splitlines()
    total = sum(p.stat().st_size for p in folder.iterdir() if p.name != "notes.txt")
    assert lines[:2] == ["repository  me/vmoe (private), branch v2", f"commit      one, {len(plan.files)} files, {total:,} bytes"]
    listed: dict[str, Any] = {words[0]: words[1:] for words in map(str.split, lines[2 : 2 + len(plan.files)])}
    for name, (size, _, digest) in listed.items():
        data = (folder / name).read_bytes()
        assert (size, digest) == (f"{len(data):,}", hashlib.sha256(data).hexdigest())
    assert "not sent    notes.txt (not in manifest.json)" in lines
    assert "  license: mit" in lines and "  pipeline_tag: image-classification" in lines
