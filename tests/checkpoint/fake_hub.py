"""A Hugging Face hub for tests, on loopback: the requests that huggingface_hub makes to create, fill, list and read a model repository.

What it holds is in `FakeHub.repos`; what was asked of it in `FakeHub.requests`. It knows two users by their tokens, stores large files by
their SHA-256 only after it has checked their bytes, and answers errors as the hub does. Xet is not spoken: set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_token_of_me": "me", "hf_token_of_you": "you"}
LARGE = (".safetensors",)


@dataclass
class Commit:
    """One commit: its id, and the whole content by path."""

    oid: str
    summary: str
    files: dict[str, bytes]
    large: set[str]


@dataclass
class Repo:
    """A model repository: branches are lists of commits, the newest last."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


class FakeHub(ThreadingHTTPServer):
    """The server and its memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.damage_uploads = False
        """Change a byte of every large upload on its way."""
        self.damage_commits = False
        """Store another README.md than was sent, and say nothing."""
        self.hang_up_at = ""
        """Close the connection without an answer where a request's path holds this text."""

    def add_repo(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        """A repository that is there already."""
        first = Commit(hashlib.sha1(name.encode()).hexdigest(), "initial commit", dict(files), set())
        self.repos[name] = Repo(private, {"main": [first]})
        return self.repos[name]


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    """One method a kind of request; `_route` picks it."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route(b"")

    def do_HEAD(self) -> None:
        self._route(b"")

    def do_POST(self) -> None:
        self._route(self._body())

    def do_PUT(self) -> None:
        self._route(self._body())

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().strip(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    # -- answers

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **headers})

    # -- who may do what

    @property
    def _user(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return TOKENS.get(token) if scheme == "Bearer" else None

    def _repo_for(self, name: str, *, write: bool) -> Repo | None:
        """The repository, or None when an error was answered."""
        repo, owner = self.server.repos.get(name), name.split("/")[0]
        if repo is None or (repo.private and self._user != owner):
            self._error(404, "Repository not found", "RepoNotFound")
            return None
        if write and self._user != owner:
            self._error(403, f"You don't have the rights to write to {name}")
            return None
        return repo

    def _commit_for(self, name: str, revision: str) -> Commit | None:
        repo = self._repo_for(name, write=False)
        commit = None if repo is None else repo.find(revision)
        if repo is not None and commit is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -- requests

    def _route(self, body: bytes) -> None:
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        self.server.requests.append((self.command, address.path))
        if self.server.hang_up_at and self.server.hang_up_at in address.path:
            self.close_connection = True
            return
        if self._user is None and self.headers.get("Authorization"):
            return self._error(401, "Invalid credentials in Authorization header")
        match parts:
            case ["api", "validate-yaml"]:
                self._validate_card(json.loads(body)["content"])
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models", user, name]:
                self._info(f"{user}/{name}", "main")
            case ["api", "models", user, name, "revision", revision]:
                self._info(f"{user}/{name}", revision)
            case ["api", "models", user, name, "branch", branch]:
                self._branch(f"{user}/{name}", branch)
            case ["api", "models", user, name, "preupload", _]:
                self._preupload(f"{user}/{name}", json.loads(body))
            case ["api", "models", user, name, "commit", revision]:
                self._commit(f"{user}/{name}", revision, body)
            case ["api", "models", user, name, "paths-info", revision]:
                self._paths(f"{user}/{name}", revision, body)
            case ["api", "models", user, name, "tree", revision]:
                self._tree(f"{user}/{name}", revision)
            case [user, name, "info", "lfs", "objects", "batch"]:
                self._lfs_batch(f"{user}/{name.removesuffix('.git')}", json.loads(body))
            case ["lfs", oid]:
                self._lfs_put(oid, body)
            case ["lfs", oid, "verify"]:
                held = len(self.server.objects.get(oid, b""))
                self._json({}) if held == json.loads(body)["size"] else self._error(400, "Size mismatch")
            case [user, name, "resolve", revision, *path]:
                self._resolve(f"{user}/{name}", revision, "/".join(path))
            case _:
                self._error(404, f"no such request: {self.command} {self.path}")

    def _validate_card(self, content: str) -> None:
        header = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        if not isinstance(header, dict) or "license" not in header:
            return self._json({"errors": [{"message": '"license" is required'}]}, 400)
        self._json({"errors": [], "warnings": []})

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or self._user
        name = f"{owner}/{wanted['name'].split('/')[-1]}"
        if self._user is None:
            return self._error(401, "Invalid username or password.")
        if owner != self._user:
            return self._error(403, f"You don't have the rights to create a model under the namespace {owner}")
        if name in self.server.repos:
            return self._error(409, "You already created this model repo")
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.add_repo(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json({"url": f"{self.server.url}/{name}"})

    def _info(self, name: str, revision: str) -> None:
        commit = self._commit_for(name, revision)
        if commit is not None:
            siblings = [{"rfilename": path} for path in commit.files]
            private = self.server.repos[name].private
            self._json({"id": name, "modelId": name, "sha": commit.oid, "private": private, "siblings": siblings, "tags": []})

    def _branch(self, name: str, branch: str) -> None:
        repo = self._repo_for(name, write=True)
        if repo is not None:
            if branch in repo.branches:
                return self._error(409, "Reference already exists")
            repo.branches[branch] = list(repo.branches["main"])
            self._json({})

    def _preupload(self, name: str, wanted: dict[str, Any]) -> None:
        if self._repo_for(name, write=True) is not None:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
                for f in wanted["files"]
            ]
            self._json({"files": modes})

    def _lfs_batch(self, name: str, wanted: dict[str, Any]) -> None:
        if self._repo_for(name, write=True) is None:
            return
        objects = []
        for item in wanted["objects"]:
            href = f"{self.server.url}/lfs/{item['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append({**item, **({} if item["oid"] in self.server.objects else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str, body: bytes) -> None:
        if self.server.damage_uploads:
            body = bytes([body[0] ^ 1]) + body[1:]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "The SHA-256 of the upload is not its name")
        self.server.objects[oid] = body
        self._send(200, b"")

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        repo = self._repo_for(name, write=True)
        if repo is None:
            return
        if revision not in repo.branches:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        last = repo.branches[revision][-1]
        files, large, summary = dict(last.files), set(last.large), ""
        for entry in map(json.loads, body.decode().splitlines()):
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                summary = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                if self.server.damage_commits and value["path"] == "README.md":
                    files[value["path"]] = files[value["path"]].swapcase()
            elif kind == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self._error(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
                large.add(value["path"])
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    return self._error(404, "A file with this name doesn't exist", "EntryNotFound")
        oid = hashlib.sha1(last.oid.encode() + body).hexdigest()
        repo.branches[revision].append(Commit(oid, summary, files, large))
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def _entry(self, commit: Commit, path: str) -> dict[str, Any]:
        data = commit.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return {**entry, "lfs": lfs} if path in commit.large else entry

    def _tree(self, name: str, revision: str) -> None:
        commit = self._commit_for(name, revision)
        if commit is not None:
            self._json([self._entry(commit, path) for path in sorted(commit.files)])

    def _paths(self, name: str, revision: str, body: bytes) -> None:
        commit = self._commit_for(name, revision)
        if commit is not None:
            wanted = parse_qs(body.decode())["paths"]
            self._json([self._entry(commit, path) for path in wanted if path in commit.files])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit_for(name, revision)
        if commit is None:
            return
        if path not in commit.files:
            return self._error(404, "Entry not found", "EntryNotFound")
        entry = self._entry(commit, path)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        self._send(200, commit.files[path], {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"})
