"""An exported folder -> a repository on the Hugging Face hub: exactly the files of its manifest, in one commit.

    plan_push (checks the folder against its manifest) -> describe (what a dry run prints) | push (create, send, commit, compare)

The token is the hub's own: `hf auth login` or HF_TOKEN. It never stands on a command line, where other users of the host would see it.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.hf_api import RepoFile

from m2mkd_ds.checkpoint.atomic import StoreError, file_sha256, read_json
from m2mkd_ds.checkpoint.hf.manifest import MANIFEST, MODEL_TYPE, read_manifest, verify_manifest
from m2mkd_ds.logs import logger

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NEUTRAL = {".gitattributes", ".gitignore", "LICENSE", "README.md"}
"""Files that a repository may hold without being a model."""


class HubError(RuntimeError):
    """The hub cannot be reached, or fails; the same command may succeed later."""

    exit_code = 1


@dataclass(frozen=True)
class PushFile:
    """One file to send."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class PushPlan:
    """What `push` will do."""

    folder: Path
    repo: str
    """USER/NAME."""
    private: bool
    revision: str
    """Branch; made from `main` when it is not there."""
    files: tuple[PushFile, ...]
    left_out: tuple[str, ...]
    """Files of the folder that are not in its manifest, and are not sent."""


def check_repo(repo: str) -> None:
    """Raises ValueError for a repository name that the hub does not allow."""
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1:
        raise ValueError(f"--push is {repo!r}; expected USER/NAME or ORGANISATION/NAME")
    validate_repo_id(repo)


def plan_push(folder: Path, repo: str, *, private: bool, revision: str = "main") -> PushPlan:
    """Check `folder` against its manifest and list what would be sent.

    Raises ValueError for a repository name that the hub does not allow, StoreError for a folder without a manifest, or with a file
    that is missing or changed.
    """
    check_repo(repo)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise StoreError(f"{folder}: holds no {MANIFEST}; only a folder that `m2mkd export` wrote is pushed")
    verify_manifest(folder)
    entries = read_manifest(folder)
    entries[MANIFEST] = (manifest.stat().st_size, file_sha256(manifest))
    files = tuple(PushFile(name, *entries[name]) for name in sorted(entries))
    left_out = tuple(sorted(p.name for p in folder.iterdir() if p.name not in entries))
    return PushPlan(folder, repo, private, revision, files, left_out)


def describe(plan: PushPlan) -> str:
    """The plan for people: repository, every file with size and SHA-256, the head of the model card."""
    width = max(len(file.name) for file in plan.files)
    size = max(len(f"{file.num_bytes:,}") for file in plan.files)
    total = sum(file.num_bytes for file in plan.files)
    card = (plan.folder / "README.md").read_text(encoding="utf-8")
    header = card.split("---\n")[1].rstrip() if card.startswith("---\n") else "(no header)"
    return "\n".join(
        [
            f"repository  {plan.repo} ({'private' if plan.private else 'public'}), branch {plan.revision}",
            f"commit      one, {len(plan.files)} files, {total:,} bytes",
            *(f"  {file.name:{width}}  {file.num_bytes:>{size},}  sha256 {file.sha256}" for file in plan.files),
            *(f"not sent    {name} (not in {MANIFEST})" for name in plan.left_out),
            "card",
            *(f"  {line}" for line in header.splitlines()),
        ]
    )


def push(plan: PushPlan) -> str:
    """Send the files in one commit, compare what the hub then holds with the plan, and return the commit's address.

    Files of an older export in the repository that the new one does not have are deleted in the same commit. Raises ValueError for what
    the user can mend (no token, no right to write, a repository of something else), HubError when the hub fails or is out of reach.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    token = get_token()
    if token is None:
        raise ValueError("there is no token of the Hugging Face hub on this machine; run `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    with _bars_on_a_terminal_only(), _one_sentence(plan, api.endpoint):
        stale = _prepare_repository(api, plan)
        adds = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=plan.folder / file.name) for file in plan.files]
        done = api.create_commit(
            plan.repo,
            [*adds, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
            commit_message="Export of m2mkd_ds",
            revision=plan.revision,
        )
        _compare(api, plan, done.oid)
    logger.info("push: %d files are at %s, commit %s", len(plan.files), plan.repo, done.oid)
    return done.commit_url


def _prepare_repository(api: HfApi, plan: PushPlan) -> list[str]:
    """Make repository and branch if they are not there. Returns the files of an older export that the new one does not have.

    Raises ValueError for a repository that holds something else, or is public when a private one is asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(plan.repo)
    except RepositoryNotFoundError:
        api.create_repo(plan.repo, private=plan.private)
        info = None
    if info is not None and plan.private and not info.private:
        raise ValueError(f"{plan.repo} exists and is public, and --private was given; make it private on the hub, or push elsewhere")
    if plan.revision != "main":
        api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
    return [] if info is None else _files_to_replace(api, plan)


def _files_to_replace(api: HfApi, plan: PushPlan) -> list[str]:
    held = set(api.list_repo_files(plan.repo, revision=plan.revision))
    if not held - _NEUTRAL:
        return []
    with tempfile.TemporaryDirectory() as scratch:

        def read(name: str) -> dict[str, object]:
            found = read_json(api.hf_hub_download(plan.repo, name, revision=plan.revision, local_dir=scratch)) if name in held else {}
            return found if isinstance(found, dict) else {}

        kind, files = read("config.json").get("model_type"), read(MANIFEST).get("files", {})
    if kind != MODEL_TYPE:
        what = "no config.json" if kind is None else f"a model of type {kind!r}"
        raise ValueError(f"{plan.repo} exists and holds something else ({len(held)} files, {what}); push under another name")
    old = set(files) if isinstance(files, dict) else set()
    return sorted((old & held) - {file.name for file in plan.files})


def _compare(api: HfApi, plan: PushPlan, commit: str) -> None:
    """What the hub holds at `commit` against the plan: the checksum of every file. Raises HubError."""
    found = {info.path: info for info in api.get_paths_info(plan.repo, [file.name for file in plan.files], revision=commit)}
    for file in plan.files:
        info = found.get(file.name)
        if not isinstance(info, RepoFile) or not _same(info, file, plan.folder):
            raise HubError(f"{plan.repo}: the hub holds another {file.name} than was sent (commit {commit}); push it again")


def _same(info: RepoFile, file: PushFile, folder: Path) -> bool:
    """Large files are known by their SHA-256, the others by git's SHA-1 of `blob SIZE`, a zero byte and the content."""
    if info.lfs is not None:
        return info.lfs.sha256 == file.sha256
    data = (folder / file.name).read_bytes()
    return info.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    """The hub's library draws its progress bars anywhere: in a log file their carriage returns and blanked lines are garbage."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _one_sentence(plan: PushPlan, endpoint: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    transport = HfHubHTTPError.__bases__[0]  # HTTPError of the HTTP library, which changed its name between releases
    try:
        yield
    except OfflineModeIsEnabled as err:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing was sent; unset it to push") from err
    except (HfHubHTTPError, transport, RuntimeError) as err:  # type: ignore[misc]  # mypy cannot know that a computed class is an error
        # A failed upload of a large file arrives wrapped.
        cause = err.__cause__ if isinstance(err, RuntimeError) and err.__cause__ is not None else err
        if isinstance(cause, HfHubHTTPError):
            raise _refused(plan, cause.response.status_code, cause) from err
        if isinstance(cause, transport):
            raise HubError(f"{endpoint} cannot be reached ({cause or type(cause).__name__}); push again when it can") from err
        raise


def _refused(plan: PushPlan, status: int, err: Exception) -> Exception:
    if status == 401:
        return ValueError(f"{plan.repo}: the hub does not know the token (401); log in again with `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return ValueError(f"{plan.repo}: the token may not write there (403); push under your own name, or use a token with the right to")
    said = str(err).strip().splitlines()
    return HubError(f"{plan.repo}: the hub answered {status} ({said[0] if said else 'no reason'}); push again later")
