"""Facts of fetching and unpacking: only the file that was asked for is kept, and no name leads out of the folder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.sources.archives import archive_files, fetch, fetch_text, unpack
from m2mkd_ds.data.sources.icon_sets import fetch_package


class Server:
    """Answers with what `pages` holds."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                data = outer.pages.get(self.path)
                self.send_response(404 if data is None else 200)
                # `short`: a connection that ends too early.
                self.send_header("Content-Length", str(len(data or b"") + (100 if self.path.startswith("/short") else 0)))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def test_only_the_file_that_was_asked_for_is_kept(tmp_path: Path, server: Server) -> None:
    data = b"content" * 1000
    server.pages = {"/a": data, "/other": data[:-1], "/short": data[:-5]}
    sha = hashlib.sha256(data).hexdigest()
    path = fetch(f"{server.url}/a", tmp_path / "deep" / "a", "sha256", sha)
    assert path.read_bytes() == data
    fetch(f"{server.url}/a", path, "sha256", sha)
    assert server.asked == ["/a"]  # kept, not fetched again
    for page, message in (
        ("other", "its sha256 is .*, expected .*; nothing was kept"),
        ("short", "cannot be fetched|its sha256 is"),
        ("none", "cannot be fetched .*Not Found.*name it with --path"),
    ):
        with pytest.raises(ShardError, match=message):
            fetch(f"{server.url}/{page}", tmp_path / "b", "sha256", sha)
    server.stop()
    with pytest.raises(ShardError, match="cannot be fetched .*refused"):
        fetch(f"{server.url}/a", tmp_path / "b", "sha256", sha)
    assert [item.name for item in tmp_path.iterdir()] == ["deep"]
    path.write_bytes(b"damaged")
    with pytest.raises(ShardError, match="deep/a: its sha256 is .*; fetch it again"):
        fetch(f"{server.url}/a", path, "sha256", sha)


def test_a_text_has_a_limit(server: Server) -> None:
    server.pages = {"/a": b"x" * 100}
    assert fetch_text(f"{server.url}/a", limit=100) == "x" * 100
    with pytest.raises(ShardError, match="longer than 99 bytes"):
        fetch_text(f"{server.url}/a", limit=99)


def test_an_npm_package_is_checked_against_registry_and_pin(tmp_path: Path, server: Server) -> None:
    data = b"archive"
    # npm's form: base64 of the raw digest.
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    meta = "/npm/@iconify%2fjson/1.0.0"

    def registry(tarball: str, published: str) -> None:
        server.pages = {meta: json.dumps({"dist": {"tarball": tarball, "integrity": published}}).encode(), "/npm/j.tgz": data}

    # A mirror that still names the registry that it mirrors.
    registry("https://registry.npmjs.org/j.tgz", integrity)
    path = fetch_package(tmp_path / "a", f"{server.url}/npm", "1.0.0", integrity)
    assert (path.name, path.read_bytes()) == ("iconify-json-1.0.0.tgz", data)
    assert server.asked == [meta, "/npm/j.tgz"]
    fetch_package(tmp_path / "a", "http://127.0.0.1:9/", "1.0.0", integrity)  # kept: nobody is asked
    registry(f"{server.url}/npm/j.tgz", "sha512-AAAA")
    with pytest.raises(ShardError, match="the registry says sha512-AAAA, but @iconify/json 1.0.0 is sha512-"):
        fetch_package(tmp_path / "b", f"{server.url}/npm/", "1.0.0", integrity)
    registry(f"{server.url}/npm/j.tgz", integrity)
    server.pages["/npm/j.tgz"] = b"altered"
    with pytest.raises(ShardError, match="its sha512 is .*nothing was kept"):
        fetch_package(tmp_path / "b", f"{server.url}/npm/", "1.0.0", integrity)
    server.pages[meta] = b"<html>"
    with pytest.raises(ShardError, match="not what an npm registry answers; check npm_config_registry"):
        fetch_package(tmp_path / "b", f"{server.url}/npm/", "1.0.0", integrity)


def make_tgz(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """Bytes: a file. Text: a symbolic link to it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_unpacking_makes_regular_files_inside_the_folder_only(tmp_path: Path) -> None:
    archive = make_tgz(tmp_path / "a.tgz", [("x/1", b"one"), ("x/link", "/etc/passwd"), ("x/2", b"two"), ("y", b"unwanted")])
    folder = unpack(archive, tmp_path / "out" / "x", lambda name: name.startswith("x/"))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {"x/1", "x/2"}
    assert (folder / "x/2").read_bytes() == b"two"
    for name in ("../evil", "x/../../evil", "/tmp/evil"):
        with pytest.raises(ShardError, match="leads out of its folder; do not trust this archive"):
            unpack(make_tgz(tmp_path / "b.tgz", [("ok", b"1"), (name, b"2")]), tmp_path / "out" / "b", lambda name: True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    assert not (tmp_path / "evil").exists()


def test_an_archive_that_ends_early_is_refused(tmp_path: Path) -> None:
    archive = make_tgz(tmp_path / "a.tgz", [("x", bytes(range(256)) * 400)])
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(ShardError, match="a.tgz: not a complete tar file"):
        list(archive_files(archive, lambda name: True))
    (tmp_path / "b.tgz").write_bytes(b"no archive")
    with pytest.raises(ShardError, match="b.tgz: not a complete tar file"):
        list(archive_files(tmp_path / "b.tgz", lambda name: True))
