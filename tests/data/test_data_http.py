"""Facts of http reads against a server that misbehaves: the bytes are right or there is a clear error, in time, without tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.remote.files import RangeFiles
from m2mkd_ds.data.remote.http_transport import HttpClient, Refused, is_hugging_face
from m2mkd_ds.data.remote.transports import open_stream
from m2mkd_ds.data.shard_files import Access
from tests.data.faulty_server import Fault, FaultyServer, cut, redirect, reset, serving, slow, stall, status, wrong_range

BODY = bytes(i * 7 % 251 for i in range(3_000_000))


class Record:
    """What RangeFiles has to know of a shard."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.bytes, self.sha256 = name, size, ""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(BODY)
    with serving(folder) as server:
        yield server


def files(base: str, *, deadline_s: float = 20.0, name: str = "a.tar", size: int = len(BODY)) -> RangeFiles:
    return RangeFiles([Record(name, size)], base, Access(deadline_s=deadline_s), named=base)


def test_a_range_is_read(server: FaultyServer) -> None:
    reader = files(server.url)
    assert reader.read(0, 1000, 5000) == BODY[1000:6000]
    assert reader.read(0, len(BODY) - 10, 100) == BODY[-10:]
    assert reader.read(0, len(BODY) + 5, 100) == b""
    assert reader.read(0, 7, 0) == b""
    assert reader.counts().bytes_fetched == 5010
    assert reader.counts().retries == 0


def test_connections_are_kept(server: FaultyServer) -> None:
    reader = files(server.url)
    for i in range(50):
        assert reader.read(0, i * 100, 100) == BODY[i * 100 : i * 100 + 100]
    # One connection; the size of the file came with the first answer.
    assert (server.connections, len(server.requests)) == (1, 50)


MENDED = [
    status(500),
    status(503),
    status(429, Retry_After="1"),
    cut(100),
    cut(0),
    reset(100),
    wrong_range(1),
    stall(1.5, 100),
]


@pytest.mark.parametrize("fault", MENDED, ids=["500", "503", "429", "short", "empty", "reset", "wrong range", "stall"])
def test_a_passing_fault_is_mended(server: FaultyServer, fault: Fault) -> None:
    server.faults = [fault, fault]
    reader = files(server.url, deadline_s=4.0)  # so that a silence of 1 s is a fault
    assert reader.read(0, 1000, 5000) == BODY[1000:6000]
    assert reader.counts().retries == 2
    assert reader.counts().bytes_fetched == 5000


def test_retry_after_is_obeyed(server: FaultyServer) -> None:
    server.faults = [status(429, Retry_After="1")]
    began = time.monotonic()
    assert files(server.url).read(0, 0, 10) == BODY[:10]
    assert time.monotonic() - began >= 1.0


def test_a_pause_beyond_the_deadline_is_not_waited_for(server: FaultyServer) -> None:
    server.always = status(503, Retry_After="120")
    began = time.monotonic()
    with pytest.raises(SampleError, match="asks for a pause of 120 s") as caught:
        files(server.url, deadline_s=5.0).read(0, 0, 10)
    assert caught.value.kind == "io"
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(500), "HTTP 500 Internal Server Error"),
        (cut(3), "IncompleteRead|ended early"),
        (wrong_range(5), "asked for 10 bytes at 0, the answer is for"),
        (stall(2.0), "Timeout"),
    ],
    ids=["500", "short", "wrong range", "stall"],
)
def test_at_the_deadline_it_is_an_io_fault(server: FaultyServer, fault: Fault, message: str) -> None:
    server.always = fault
    began = time.monotonic()
    with pytest.raises(SampleError, match=message) as caught:
        files(server.url, deadline_s=1.0).read(0, 0, 10)
    assert caught.value.kind == "io"
    assert "a.tar" in str(caught.value)
    assert "data.io_deadline_s is 1" in str(caught.value)
    assert 0.3 < time.monotonic() - began < 2.5


def test_a_dead_server_costs_its_deadline_once(server: FaultyServer) -> None:
    server.always = status(500)
    reader = files(server.url, deadline_s=1.0)
    with pytest.raises(SampleError):
        reader.read(0, 0, 10)
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(SampleError, match="tried once only"):
            reader.read(0, 0, 10)
    assert time.monotonic() - began < 1.0
    server.always = None
    assert reader.read(0, 0, 10) == BODY[:10]
    server.faults = [status(500)]
    assert reader.read(0, 0, 10) == BODY[:10]  # and patience is back


def test_nobody_listens(server: FaultyServer) -> None:
    server.server_close()
    with pytest.raises(SampleError, match="refused") as caught:
        files("http://127.0.0.1:9", deadline_s=0.5).read(0, 0, 10)
    assert caught.value.kind == "io"


def test_no_such_file_fails_at_once(server: FaultyServer) -> None:
    with pytest.raises(ShardError, match=r"missing\.tar: HTTP 404 Not Found; check the address"):
        files(server.url, name="missing.tar").read(0, 0, 10)
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_names_the_variable_of_the_token(server: FaultyServer, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server.always = status(code)
    with pytest.raises(ShardError, match=f"HTTP {code} .*put it into the environment variable M2MKD_HTTP_TOKEN"):
        files(server.url).read(0, 0, 10)
    monkeypatch.setenv("M2MKD_HTTP_TOKEN", "s3cr3t")
    with pytest.raises(ShardError, match="token in the environment variable M2MKD_HTTP_TOKEN was not accepted"):
        files(server.url).read(0, 0, 10)
    assert len(server.requests) == 2


def test_a_server_without_range_is_refused_before_a_file_is_read(server: FaultyServer) -> None:
    server.ranges = False
    with pytest.raises(ShardError, match="ignores Range .* set data.cache_dir"):
        files(server.url).check_first()


def test_another_size_than_indexed_is_seen(server: FaultyServer) -> None:
    wrong = files(server.url, size=len(BODY) + 1)
    with pytest.raises(ShardError, match="has 3000000 bytes, the index says 3000001"):
        wrong.check_first()
    with pytest.raises(ShardError, match="has 3000000 bytes, the index says 3000001"):
        files(server.url, size=len(BODY) + 1).read(0, 0, 10)


def test_a_token_goes_to_the_named_host_only(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("M2MKD_HTTP_TOKEN", "s3cr3t")
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    with serving(server.folder) as other, caplog.at_level(logging.DEBUG):
        server.always = redirect(other.url)
        other.faults = [status(500)]
        reader = files(server.url)
        assert reader.read(0, 100, 10) == BODY[100:110]
        assert reader.read(0, 200, 10) == BODY[200:210]
        assert [headers.get("Authorization") for _, headers in server.requests] == ["Bearer s3cr3t"] * 2
        assert [headers.get("Authorization") for _, headers in other.requests] == [None] * 3
        # What the redirect named is asked directly until it refuses, as a signed address does when it has expired.
        other.faults = [status(403)]
        assert reader.read(0, 300, 10) == BODY[300:310]
        assert len(server.requests) == 3
        other.always = status(403)
        with pytest.raises(ShardError, match="gets no token, because it is not the host") as caught:
            reader.read(0, 300, 10)
    assert "s3cr3t" not in str(caught.value)
    assert "HTTP 500" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_the_hub_token_goes_to_the_hub_only() -> None:
    assert is_hugging_face("https://huggingface.co/datasets/x")
    for url in (
        "http://huggingface.co/x",
        "https://huggingface.co.evil.net/x",
        "https://evil.net/huggingface.co",
        "https://cdn-lfs.hf.co/x",
    ):
        assert not is_hugging_face(url)


def test_signatures_and_passwords_are_in_no_message_and_no_log(server: FaultyServer, caplog: pytest.LogCaptureFixture) -> None:
    base = server.url.replace("http://", "http://user:s3cr3t@") + "?X-Amz-Signature=s3cr3t"
    with caplog.at_level(logging.DEBUG):
        server.faults = [status(500), reset(0)]
        reader = files(base)
        assert reader.read(0, 0, 10) == BODY[:10]
        # "user:s3cr3t" in base 64, by `printf user:s3cr3t | base64`
        assert server.requests[0][0] == "/a.tar?X-Amz-Signature=s3cr3t"
        assert server.requests[0][1]["Authorization"] == "Basic dXNlcjpzM2NyM3Q="
        server.always = status(404)
        with pytest.raises(ShardError) as caught:
            reader.read(0, 0, 10)
        server.always = reset(0)
        with pytest.raises(SampleError) as late:
            files(base, deadline_s=0.5).read(0, 0, 10)
    assert "HTTP 500" in caplog.text
    assert '"GET /a.tar?*** HTTP/1.1" 206' in caplog.text  # urllib3's own debug line
    for text in (caplog.text, str(caught.value), str(late.value), repr(reader)):
        assert "s3cr3t" not in text
        assert "dXNlcjpzM2NyM3Q" not in text


def test_redirects_are_bounded(server: FaultyServer) -> None:
    server.always = redirect(server.url)
    with pytest.raises(Refused, match="more than 5 redirects"):
        HttpClient(server.url).get(f"{server.url}/a.tar", {}, 5.0)
    server.always = redirect("ftp://host")
    with pytest.raises(Refused, match="no http address"):
        HttpClient(server.url).get(f"{server.url}/a.tar", {}, 5.0)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_stream_is_taken_up_where_it_broke(server: FaultyServer, ranges: bool) -> None:
    server.ranges = ranges
    server.faults = [status(500), cut(1_000_000), reset(500_000), stall(1.5, 10)]
    with open_stream(f"{server.url}/a.tar", Access(deadline_s=4.0)) as file:
        assert file.read(10) == BODY[:10]
        assert file.read() == BODY[10:]
    assert len(server.requests) == 5
    if ranges:
        assert server.requests[2][1]["Range"] == "bytes=1000000-"


def test_a_trickle_is_given_up(server: FaultyServer) -> None:
    server.always = cut(100)  # a hundred bytes more on each try: no progress that counts
    with pytest.raises(SampleError, match="given up") as caught, open_stream(f"{server.url}/a.tar", Access(deadline_s=1.0)) as file:
        file.read()
    assert caught.value.kind == "io"


def test_a_slow_answer_within_the_deadline_is_waited_for(server: FaultyServer) -> None:
    server.faults = [slow(0.6)]
    with open_stream(f"{server.url}/a.tar", Access(deadline_s=8.0)) as file:
        assert file.read() == BODY
    assert len(server.requests) == 1
