"""Facts of the other kinds of addresses: commands only when allowed, whole files only where ranges cannot be read, clear errors."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.remote.files import CachedFiles, RangeFiles, open_files
from m2mkd_ds.data.remote.transports import http_client, open_stream, open_transport
from m2mkd_ds.data.shard_files import Access, LocalFiles
from tests.data.faulty_server import serving

BODY = bytes(i * 11 % 253 for i in range(300_000))
# From `sha256sum` of these bytes written to a file.
SHA256 = "e610c7b74a0490a101c05618fa928b4ae135bae00a8bf95c75dc19a0448d6977"
ALLOWED = Access(allow_pipe=True, deadline_s=2.0)


class Record:
    name, bytes, sha256 = "a.tar", len(BODY), SHA256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.tar").write_bytes(BODY)
    return tmp_path


@pytest.fixture
def memory() -> Iterator[str]:
    """The address of a folder in fsspec's memory file system, which holds a.tar."""
    files = fsspec.filesystem("memory")
    files.pipe_file("/in1k/a.tar", BODY)
    yield "memory://in1k"
    files.rm("/in1k", recursive=True)


def read_all(address: str, access: Access = ALLOWED) -> bytes:
    with open_stream(address, access) as file:
        return file.read()


def test_a_command_is_run_only_when_that_is_allowed(folder: Path) -> None:
    with pytest.raises(ShardError, match=r"runs a shell command on every node; set data\.allow_pipe to true"):
        read_all(f"pipe:touch {folder}/ran; cat {folder}/a.tar", Access())
    assert not (folder / "ran").exists()
    assert read_all(f"pipe:cat {folder}/a.tar") == BODY


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("false", "exit status 1"),
        ("head -c 1000 {}; exit 3", "exit status 3"),
        ("head -c 1000 {}; kill -9 $$", "exit status -9"),
        ("head -c 1000 {}; sleep 60", "printed nothing"),
    ],
)
def test_a_command_that_fails_is_an_io_fault(folder: Path, command: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(SampleError, match=message) as caught:
        read_all("pipe:" + command.format(folder / "a.tar"), Access(allow_pipe=True, deadline_s=1.0))
    assert caught.value.kind == "io"
    assert time.monotonic() - began < 4


def test_a_command_that_does_not_exist_fails_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(ShardError, match="cannot run the command"):
        read_all("pipe:m2mkd-no-such-command 2>/dev/null", Access(allow_pipe=True, deadline_s=30.0))
    assert time.monotonic() - began < 5


def test_a_command_that_dies_midway_is_run_again(folder: Path) -> None:
    once = f"if [ -e {folder}/second ]; then cat {folder}/a.tar; else touch {folder}/second; head -c 100000 {folder}/a.tar; exit 1; fi"
    assert read_all("pipe:" + once) == BODY


def living(group: int) -> list[str]:
    """Processes of a group that are no zombies; in /proc/PID/stat the state, the parent and the group follow the name in brackets."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, in_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(in_group) == group and state != "Z":
                found.append(path.parent.name)
    return found


def test_a_command_left_early_is_ended(folder: Path) -> None:
    with open_stream(f"pipe:sleep 60 & echo $$ > {folder}/shell; cat {folder}/a.tar; wait", ALLOWED) as file:
        assert file.read(10) == BODY[:10]
        group = int((folder / "shell").read_text())
        assert living(group)
    assert not living(group)


def test_a_command_fills_a_cache_and_needs_one(folder: Path, tmp_path: Path) -> None:
    base = f"pipe:cat {folder}"
    with pytest.raises(ShardError, match=r"whole files only.* set data\.cache_dir"):
        RangeFiles([Record()], base, ALLOWED, named=base).check_first()
    cached = Access(allow_pipe=True, cache_dir=str(tmp_path / "c"))
    files = CachedFiles([Record()], base, "f" * 64, cached, named=base)
    files.check_first()
    assert files.read(0, 1000, 50) == BODY[1000:1050]


def test_other_programs_of_webdataset_are_told_when_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ShardError, match="the program 'ais' is not installed, and ais needs it"):
        read_all("ais://bucket/a.tar")


def test_an_address_is_never_rewritten_into_a_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"sftp://=pipe:touch {folder}/ran #")
    with pytest.raises((ShardError, SampleError)):
        read_all("sftp://127.0.0.1:9/a.tar", Access(deadline_s=0.3))
    assert not (folder / "ran").exists()


def test_webdatasets_programs_read_whole_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real `ais get URL -` is not here; a script of its name that prints the file stands for it.
    (folder / "bin").mkdir()
    program = folder / "bin" / "ais"
    program.write_text(f'#!/bin/sh\n[ "$1 $3" = "get -" ] && exec /bin/cat "{folder}/${{2#ais://bucket/}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert read_all("ais://bucket/a.tar") == BODY


def test_fsspec_addresses_are_read_by_range_and_as_a_whole(memory: str, tmp_path: Path) -> None:
    assert read_all(f"{memory}/a.tar") == BODY
    files = RangeFiles([Record()], memory, ALLOWED, named=memory)
    files.check_first()
    assert files.read(0, 1000, 50) == BODY[1000:1050]
    assert files.read(0, len(BODY) - 5, 50) == BODY[-5:]
    cached = open_files([Record()], memory, "f" * 64, Access(cache_dir=str(tmp_path)), named=memory)
    assert cached.read(0, 5, 50) == BODY[5:55]


def test_fsspec_says_what_is_missing(memory: str) -> None:
    with pytest.raises(ShardError, match=r"memory://in1k/b\.tar: FileNotFoundError.* check the address"):
        read_all(f"{memory}/b.tar")

    class Longer:
        name, bytes, sha256 = "a.tar", len(BODY) + 1, SHA256

    with pytest.raises(ShardError, match="has 300000 bytes, the index says 300001"):
        RangeFiles([Longer()], memory, ALLOWED, named=memory).check_first()


def test_a_missing_package_says_how_to_install_it() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from m2mkd_ds.data.remote.transports import open_stream\nfrom m2mkd_ds.data.shard_files import Access\n"
        "try:\n    open_stream('s3://bucket/a.tar', Access())\nexcept ValueError as err:\n    print(err)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "s3://bucket/a.tar: s3:// needs a package" in done.stdout
    assert "pip install 'm2mkd_ds[s3]'" in done.stdout


def test_an_unknown_scheme_names_those_that_are_known() -> None:
    with pytest.raises(ShardError, match=r"unknown scheme 'gopher'; allowed are a path, file://, http\(s\)://"):
        read_all("gopher://host/a.tar")


def test_the_reader_is_the_one_that_base_and_cache_ask_for(folder: Path, tmp_path: Path) -> None:
    cached = Access(cache_dir=str(tmp_path / "c"))
    for base, access, kind in [
        (str(folder), Access(), LocalFiles),
        (f"file://{folder}", Access(), LocalFiles),
        (str(folder), cached, CachedFiles),
        ("https://host/x", Access(), RangeFiles),
        ("https://host/x", cached, CachedFiles),
    ]:
        assert type(open_files([Record()], base, "f" * 64, access, named=base)) is kind
    assert open_files([Record()], f"file://{folder}", "", Access(), named="").read(0, 3, 4) == BODY[3:7]


def test_a_local_file_is_streamed_and_missed_clearly(folder: Path) -> None:
    assert read_all(str(folder / "a.tar")) == BODY
    with pytest.raises(ShardError, match="b.tar: No such file"):
        read_all(str(folder / "b.tar"))
    transport = open_transport(str(folder / "a.tar"), Access(), http_client("", Access()))
    assert (transport.size(1.0), transport.read(10, 5, 1.0)) == (300_000, BODY[10:15])


def test_a_stream_over_http_needs_no_seeking(folder: Path) -> None:
    with serving(folder) as server, open_stream(f"{server.url}/a.tar", Access()) as file:
        assert not file.seekable()
        parts = [file.read(7_000) for _ in range(50)]
    assert b"".join(parts) == BODY
    assert server.connections == 1
