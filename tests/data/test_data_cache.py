"""Facts of the cache: right bytes or an error, each shard fetched once, never more than the cap, nothing half left by any death."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.remote.cache import ShardCache, Wanted
from m2mkd_ds.data.remote.files import CachedFiles
from m2mkd_ds.data.shard_files import Access
from tests.data.faulty_server import FaultyServer, cut, flipped, serving, slow, stall, status

SIZE = 40_000


def body(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def wanted(data: bytes, name: str = "shard-0.tar") -> Wanted:
    return Wanted(name, len(data), hashlib.sha256(data).hexdigest(), "the shard")


def source(data: bytes, pieces: int = 4, pause_s: float = 0.0) -> Callable[[], Iterator[bytes]]:
    def give() -> Iterator[bytes]:
        for i in range(pieces):
            yield data[i * len(data) // pieces : (i + 1) * len(data) // pieces]
            time.sleep(pause_s)

    return give


class Record:
    """What CachedFiles has to know of a shard."""

    def __init__(self, number: int) -> None:
        data = body(number)
        self.name, self.bytes, self.sha256 = f"{number}.tar", len(data), hashlib.sha256(data).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.tar").write_bytes(body(number))
    with serving(folder) as server:
        yield server


def files(server: FaultyServer | None, cache: Path, *, base: str = "", cap: int = 10**9, look_ahead: int = 4, deadline_s: float = 20.0) -> CachedFiles:  # fmt: skip  # noqa: E501
    base = base or (server.url if server else "")
    access = Access(cache_dir=str(cache), cache_gb=cap / 1e9, look_ahead=look_ahead, deadline_s=deadline_s)
    return CachedFiles([Record(number) for number in range(8)], base, "f" * 64, access, named=base)


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "shards").glob("*/*") if path.suffix != ".lock")


def test_a_shard_is_fetched_once_and_read_from_then_on(server: FaultyServer, tmp_path: Path) -> None:
    reader = files(server, tmp_path / "c")
    for offset in (0, 5, 39_990):
        assert reader.read(2, offset, 20) == body(2)[offset : offset + 20]
    other = files(server, tmp_path / "c")
    assert other.read(2, 7, 9) == body(2)[7:16]
    assert len(server.requests) == 1
    assert (reader.counts().misses, reader.counts().hits, reader.counts().bytes_fetched) == (1, 2, SIZE)
    assert (other.counts().misses, other.counts().hits, other.counts().bytes_fetched) == (0, 1, 0)


def test_a_local_folder_is_cached_too(server: FaultyServer, tmp_path: Path) -> None:
    reader = files(None, tmp_path / "c", base=str(server.folder))
    assert reader.read(3, 10, 10) == body(3)[10:20]
    assert names(tmp_path / "c") == ["shard-000003.tar"]


def test_a_server_without_range_is_fine_with_a_cache(server: FaultyServer, tmp_path: Path) -> None:
    server.ranges = False
    server.faults = [status(200)]  # an answer of another length to the size check
    reader = files(server, tmp_path / "c")
    with pytest.raises(ShardError, match="has 2 bytes, the index says 40000"):
        reader.check_first()
    server.faults = [cut(100)]
    reader = files(server, tmp_path / "c")
    assert reader.read(0, 10, 10) == body(0)[10:20]
    assert reader.counts().retries == 1


def test_bytes_that_arrived_damaged_are_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = [flipped(30_000)]
    reader = files(server, tmp_path / "c")
    assert reader.read(0, 29_990, 20) == body(0)[29_990:30_010]
    assert len(server.requests) == 2


def test_bytes_that_stay_damaged_are_an_error_and_not_kept(server: FaultyServer, tmp_path: Path) -> None:
    server.always = flipped(30_000)
    reader = files(server, tmp_path / "c")
    for _ in range(3):  # the next reads know already
        with pytest.raises(SampleError, match=r"0\.tar: other bytes came .* twice") as caught:
            reader.read(0, 0, 10)
        assert caught.value.kind == "checksum"
    assert len(server.requests) == 2
    assert names(tmp_path / "c") == []


@pytest.mark.parametrize("change", [lambda data: data + b"x", lambda data: data[:-1]], ids=["longer", "shorter"])
def test_another_length_is_an_error_and_not_kept(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, "f" * 64, 10**6)
    with pytest.raises(ShardError, match="the index says 40000|more than the 40000 bytes"):  # as without a cache
        cache.fetch(wanted(body(0)), source(change(body(0))))
    assert names(tmp_path) == []


def test_a_deadline_leaves_nothing(server: FaultyServer, tmp_path: Path) -> None:
    server.always = stall(3.0, 100)
    with pytest.raises(SampleError, match="given up") as caught:
        files(server, tmp_path / "c", deadline_s=0.6).read(0, 0, 10)
    assert caught.value.kind == "io"
    assert names(tmp_path / "c") == []


def test_a_shard_above_the_cap_is_refused_before_it_is_fetched(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"has 40000 bytes, and data\.cache_gb allows 39999"):
        files(server, tmp_path / "c", cap=SIZE - 1).read(0, 0, 10)
    assert server.requests == []


def test_the_shard_unused_for_longest_goes_first(server: FaultyServer, tmp_path: Path) -> None:
    reader = files(server, tmp_path / "c", cap=3 * SIZE)
    for shard in (0, 1, 2):
        reader.read(shard, 0, 1)
        time.sleep(0.02)  # the clock of file times is coarse
    assert files(server, tmp_path / "c").read(0, 0, 1) == body(0)[:1]  # another process uses 0
    time.sleep(0.02)
    reader.read(3, 0, 1)
    assert names(tmp_path / "c") == ["shard-000000.tar", "shard-000002.tar", "shard-000003.tar"]


def test_an_evicted_shard_that_is_open_stays_readable(server: FaultyServer, tmp_path: Path) -> None:
    holder = files(server, tmp_path / "c", cap=SIZE)
    assert holder.read(0, 0, 5) == body(0)[:5]
    other = files(server, tmp_path / "c", cap=SIZE)
    assert other.read(1, 0, 5) == body(1)[:5]
    assert names(tmp_path / "c") == ["shard-000001.tar"]
    assert holder.read(0, 5, 5) == body(0)[5:10]
    assert len(server.requests) == 2
    # Its bytes are freed when the holder takes another one: only then is the disk really below the cap.
    holder.read(1, 0, 5)
    assert list(holder._open) == [1]


def test_two_data_sets_share_the_cap_and_nothing_else(tmp_path: Path) -> None:
    one, two = ShardCache(tmp_path, "a" * 64, 2 * SIZE), ShardCache(tmp_path, "b" * 64, 2 * SIZE)
    one.fetch(wanted(body(1)), source(body(1)))
    time.sleep(0.02)
    shard, fetched = two.fetch(wanted(body(2)), source(body(2)))
    assert fetched and shard is not None
    assert names(tmp_path) == ["shard-0.tar", "shard-0.tar"]
    two.fetch(wanted(body(3), "shard-1.tar"), source(body(3)))
    assert one.open("shard-0.tar", SIZE) is None
    assert two.open("shard-0.tar", SIZE) is not None


def occupied(cache: Path) -> int:
    """Bytes of complete and arriving shards, at one moment of the folder."""
    total = 0
    with (cache / "cache.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in (cache / "shards").glob("*/*"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def test_the_cap_holds_at_every_moment_under_four_threads(tmp_path: Path) -> None:
    cap = 3 * SIZE
    cache = ShardCache(tmp_path, "f" * 64, cap)
    done, seen = threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            seen.append(occupied(tmp_path))

    def use(worker: int) -> None:
        order = random.Random(worker)
        for _ in range(12):
            number = order.randrange(7)
            shard, _ = cache.fetch(wanted(body(number), f"{number}.tar"), source(body(number), pause_s=0.001))
            assert shard is not None

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))
    finally:
        done.set()
        watcher.join()
    assert len(seen) > 10
    # Full at some moment: the cap was tried.
    assert max(seen) == cap
    for number in range(7):
        found = tmp_path / "shards" / ("f" * 32) / f"{number}.tar"
        assert not found.exists() or found.read_bytes() == body(number)


FILL = """
import sys
from tests.data.test_data_cache import files, body
from pathlib import Path
reader = files(None, Path(sys.argv[2]), base=sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for shard in range(8):
    assert reader.read(shard, 5, 7) == body(shard)[5:12]
print(reader.counts().misses)
"""


def start(code: str, *arguments: str, repo: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=repo, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_fill_one_cache_and_fetch_each_shard_once(server: FaultyServer, tmp_path: Path, repo_root: Path) -> None:
    server.always = slow(0.05)
    processes = [start(FILL, server.url, str(tmp_path / "c"), repo=repo_root) for _ in range(2)]
    misses = [int(process.communicate("\n", timeout=60)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(misses) == 8
    assert sorted(path for path, _ in server.requests) == [f"/{number}.tar" for number in range(8)]
    assert names(tmp_path / "c") == [f"shard-{number:06d}.tar" for number in range(8)]


def test_a_killed_fetch_leaves_only_what_the_next_user_removes(server: FaultyServer, tmp_path: Path, repo_root: Path) -> None:
    cache = tmp_path / "c"
    server.always = stall(8.0, 20_000)
    process = start(FILL, server.url, str(cache), repo=repo_root)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    until = time.monotonic() + 20
    while not names(cache) and time.monotonic() < until:
        time.sleep(0.02)
    assert names(cache) == ["shard-000000.tar.part"]
    # While it lives, its bytes count and it is left alone.
    server.always, server.faults = None, [stall(0.0, SIZE)]
    small = ShardCache(cache, "f" * 64, 2 * SIZE)
    small.fetch(wanted(body(5), "five.tar"), source(body(5)))
    assert names(cache) == ["five.tar", "shard-000000.tar.part"]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert "shard-000000.tar.part" in names(cache)
    # Another shard's fetch cleans up, and its own fetch works although a part was there.
    small.fetch(wanted(body(6), "six.tar"), source(body(6)))
    assert names(cache) == ["five.tar", "six.tar"]
    (small.folder / "shard-000000.tar.part").write_bytes(bytes(10 * SIZE))
    server.faults = []
    assert files(server, cache, cap=2 * SIZE).read(0, 0, 9) == body(0)[:9]
    assert [name for name in names(cache) if name.endswith(".part")] == []


FULL = """
import resource, sys
from pathlib import Path
from m2mkd_ds.data.remote.cache import ShardCache
from tests.data.test_data_cache import body, names, wanted
data = body(0)
def until_full():
    yield data[:10000]
    resource.setrlimit(resource.RLIMIT_FSIZE, (15000, resource.RLIM_INFINITY))
    yield data[10000:]
root = Path(sys.argv[1])
if sys.argv[2] == "before":
    resource.setrlimit(resource.RLIMIT_FSIZE, (15000, resource.RLIM_INFINITY))
try:
    ShardCache(root, "f" * 64, 10**9).fetch(wanted(data), until_full)
except Exception as err:
    print(type(err).__name__, err)
print(names(root))
"""


@pytest.mark.parametrize("when", ["before", "midway"])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(when: str, tmp_path: Path, repo_root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), when], cwd=repo_root, capture_output=True, text=True, timeout=60, check=True)  # fmt: skip  # noqa: E501
    message, left = done.stdout.splitlines()
    assert message.startswith("ShardError the shard: data.cache_dir")
    assert "is full (File too large) before data.cache_gb is reached" in message
    assert left == "[]"


def wait_for(cache: Path, expected: list[str]) -> None:
    until = time.monotonic() + 10
    while names(cache) != expected and time.monotonic() < until:
        time.sleep(0.01)
    assert names(cache) == expected


def test_expected_shards_come_by_themselves(server: FaultyServer, tmp_path: Path) -> None:
    reader = files(server, tmp_path / "c")
    reader.expect([5, 1])
    wait_for(tmp_path / "c", ["shard-000001.tar", "shard-000005.tar"])
    assert reader.read(5, 0, 4) == body(5)[:4]
    time.sleep(0.2)
    assert [path for path, _ in server.requests] == ["/5.tar", "/1.tar"]
    reader.close()


def test_a_new_expectation_replaces_the_old(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = [slow(0.3)]
    reader = files(server, tmp_path / "c")
    reader.expect([0, 1, 2])
    while not server.requests:
        time.sleep(0.01)
    reader.expect([7])
    wait_for(tmp_path / "c", ["shard-000000.tar", "shard-000007.tar"])
    time.sleep(0.1)
    assert names(tmp_path / "c") == ["shard-000000.tar", "shard-000007.tar"]
    reader.close()


def test_what_cannot_be_fetched_ahead_is_told_by_the_read_that_needs_it(server: FaultyServer, tmp_path: Path) -> None:
    server.only, server.always = "/0.tar", status(404)
    reader = files(server, tmp_path / "c")
    reader.expect([0, 1])
    wait_for(tmp_path / "c", ["shard-000001.tar"])
    with pytest.raises(ShardError, match=r"0\.tar: HTTP 404"):
        reader.read(0, 0, 4)
    reader.close()


def ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shards ahead"]


def test_readers_that_are_dropped_leave_no_thread_and_no_open_file(server: FaultyServer, tmp_path: Path) -> None:
    opened = []
    for turn in range(4):
        reader = files(server, tmp_path / "c")
        reader.expect([turn])
        wait_for(tmp_path / "c", [f"shard-{number:06d}.tar" for number in range(turn + 1)])
        assert reader.read(turn, 0, 4) == body(turn)[:4]
        threads = ahead_threads()
        assert len(threads) == 1
        del reader
        gc.collect()
        for thread in threads:
            thread.join(timeout=5.0)
        assert ahead_threads() == []
        opened.append([name for fd in Path("/proc/self/fd").iterdir() if (name := os.path.realpath(fd)).startswith(str(tmp_path))])
    assert opened == [[], [], [], []]


def test_a_copy_that_lost_bytes_on_the_disk_is_fetched_anew(server: FaultyServer, tmp_path: Path) -> None:
    assert files(server, tmp_path / "c").read(2, 39_990, 10) == body(2)[39_990:]
    (copy,) = (tmp_path / "c").rglob("shard-000002.tar")
    copy.write_bytes(body(2)[:-5])
    assert files(server, tmp_path / "c").read(2, 39_990, 10) == body(2)[39_990:]
    assert copy.read_bytes() == body(2)
    assert len(server.requests) == 2


def test_a_damaged_copy_is_let_go_once_and_never_the_one_that_replaced_it(server: FaultyServer, tmp_path: Path) -> None:
    one, two = files(server, tmp_path / "c"), files(server, tmp_path / "c")
    one.read(2, 0, 4)
    (copy,) = (tmp_path / "c").rglob("shard-000002.tar")
    copy.write_bytes(bytes(SIZE))
    assert two.read(2, 0, 4) == one.read(2, 0, 4) == bytes(4)
    one.renew(2)
    assert one.read(2, 0, 4) == body(2)[:4]
    two.renew(2)  # as another process, which still holds the damaged file
    assert two.read(2, 0, 4) == body(2)[:4]
    one.renew(2)
    assert one.read(2, 0, 4) == body(2)[:4]
    assert len(server.requests) == 2


def test_close_stops_at_once(server: FaultyServer, tmp_path: Path) -> None:
    server.always = status(503, Retry_After="10")
    reader = files(server, tmp_path / "c")
    reader.expect([0, 1, 2])
    while not server.requests:
        time.sleep(0.01)
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < 1.0
    assert not any(thread.name == "shards ahead" and thread.is_alive() for thread in threading.enumerate())
    reader.expect([3])
    time.sleep(0.1)
    assert server.asked("/3.tar") == 0
