"""Facts of the shard writer: the same bytes from any number of processes, a killed write goes on, nobody's files are touched."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.shards.processes import default_workers
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.sources.samples import ArrayImages, FileImages, Sample, encode_png

JOB = Path(__file__).parent / "write_job.py"


def load_job() -> ModuleType:
    """write_job.py as a module under its own name, so that its samples can be sent to another process."""
    spec = importlib.util.spec_from_file_location("write_job", JOB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the job writes in one process without a stop."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    load_job().write(str(folder), workers=1, pause_s=0.0)
    return contents(folder)


def children_of(pid: int) -> list[int]:
    """Process ids whose parent is `pid`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def test_a_killed_write_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(JOB), str(out), "2"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: len(list(out.glob("shard-*.tar"))) >= 2)
        workers = children_of(job.pid)
        assert len(workers) >= 2  # and multiprocessing's own resource tracker
    finally:
        job.send_signal(signal.SIGKILL)
        job.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in workers), 20.0)
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert 2 <= len(whole) < 12
    assert not (out / "index.json").exists()
    assert (out / "writing.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out) == undisturbed
    # The shards that were whole were kept, not written again.
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole


def test_a_writing_process_that_is_killed_ends_the_write_with_a_reason(tmp_path: Path) -> None:
    command = [sys.executable, str(JOB), str(tmp_path / "out"), "2", "die"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "a process that wrote shards was killed (out of memory?); finished shards are kept" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "index.json").exists()


def test_three_processes_write_the_bytes_of_one_and_say_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("m2mkd_ds.logs.PLAIN_INTERVAL_S", 0.0)
    caplog.set_level(logging.INFO, "m2mkd_ds")
    images_NHWC = np.random.default_rng(0).integers(0, 256, (40, 500, 400, 3), dtype=np.uint8)[:, ::4, ::4]
    (tmp_path / "files").mkdir()
    for number, pixels_HWC in enumerate(images_NHWC):
        (tmp_path / "files" / f"im.{number}.png").write_bytes(encode_png(pixels_HWC))
    files = FileImages(tmp_path / "files", [(f"im.{number}.png", number % 3) for number in range(40)])
    for workers in (1, 3):
        index = write_shards(
            files,
            tmp_path / str(workers),
            total=40,
            class_names=("a", "b", "c"),
            source="s",
            license="MIT",
            samples_per_shard=7,
            workers=workers,
            resize_short=64,
        )
        # 0, 1, 2, 0, ... 0: fourteen zeros and thirteen of the others.
        assert np.bincount(index.labels_N).tolist() == [14, 13, 13]
        assert f"shards s -> {workers} 40/40 (100 %)" in caplog.text
    # The lists for other readers call the set by its folder's name.
    alone, together = ({k: v for k, v in contents(tmp_path / n).items() if k not in ("_info.json", "wids.json")} for n in "13")
    assert alone == together and len(alone) == 8  # six shards, the table, the index


def one_sample(out: Path, content: str = "c") -> ShardIndex:
    return write_shards([(b"x", "png", 0, "k")], out, total=1, class_names=("a",), source="s", license="MIT", content=content)


def test_shards_that_no_write_of_ours_began_are_left_alone(tmp_path: Path) -> None:
    for name in ("shard-000000.tar", "index.npy"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"somebody's")
        with pytest.raises(ShardError, match=f"holds {name} without index.json, and no `shards write` .* left them there"):
            one_sample(folder)
        assert contents(folder) == {name: b"somebody's"}


def test_other_files_stay_when_a_folder_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other-000000.tar").write_bytes(b"mine")
    (tmp_path / "writing.json").write_text("{}")
    (tmp_path / "shard-000000.tar").write_bytes(b"half")
    index = one_sample(tmp_path)
    assert index.read(0) == (b"x", 0, "k")
    made = {"shard-000000.tar", "index.npy", "index.json", "_info.json", "wids.json"}
    assert set(contents(tmp_path)) == {"notes.txt", "other-000000.tar", *made}


def test_without_a_name_of_the_content_nothing_is_gone_on_with(tmp_path: Path) -> None:
    one_sample(tmp_path, content="")
    request = json.loads((tmp_path / "index.json").read_text())["request"]
    (tmp_path / "index.json").unlink()
    (tmp_path / "writing.json").write_text(json.dumps(request, indent=1, sort_keys=True))
    before = (tmp_path / "shard-000000.tar").stat().st_ino
    held = (tmp_path / "shard-000000.tar").open("rb")  # keeps the number of the removed file from being given again
    one_sample(tmp_path, content="")
    assert (tmp_path / "shard-000000.tar").stat().st_ino != before
    held.close()


def test_a_write_that_stopped_after_the_index_is_finished_by_the_next(tmp_path: Path) -> None:
    one_sample(tmp_path)
    (tmp_path / "writing.json").write_text("{}")
    one_sample(tmp_path)
    assert not (tmp_path / "writing.json").exists()


def test_a_second_writer_of_a_folder_is_refused(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ShardError, match="another process is writing shards into this folder"):
        one_sample(tmp_path)
    os.close(descriptor)
    one_sample(tmp_path)


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    samples = [(b"x", "png", 0, "same"), (b"y", "png", 0, "same")]
    with pytest.raises(ShardError, match=r"key 'same' is in shards 0 and 1; the key must be unique"):
        write_shards(samples, tmp_path, total=2, class_names=("a",), source="s", license="MIT", samples_per_shard=1)
    assert not (tmp_path / "index.json").exists()


def test_an_error_in_another_process_names_the_sample_and_keeps_whole_shards(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number in range(40):
        (tmp_path / "files" / f"{number}.png").write_bytes(bytes([number]))
    files = FileImages(tmp_path / "files", [(f"{number}.png", 0) for number in range(40)])
    (tmp_path / "files" / "17.png").unlink()
    for workers in (1, 2):
        with pytest.raises(ShardError, match=r"files/17.png: cannot be read \(No such file or directory\); restore or remove it"):
            write_shards(
                files,
                tmp_path / "out",
                total=40,
                class_names=("a",),
                source="s",
                license="MIT",
                samples_per_shard=4,
                content="c",
                workers=workers,
            )
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert "writing.json" in left
        assert not [name for name in left if name.endswith(".tmp") or name.startswith("index")]
    (tmp_path / "files" / "17.png").write_bytes(b"back")
    index = write_shards(files, tmp_path / "out", total=40, class_names=("a",), source="s", license="MIT", samples_per_shard=4, content="c")
    assert {index.read(i)[0] for i in range(40)} == {bytes([number]) for number in range(40) if number != 17} | {b"back"}


def test_numbers_that_make_no_sense_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    for wrong, message in (
        ({"samples_per_shard": 0}, "samples_per_shard is 0 and workers is 1"),
        ({"workers": 0}, "workers is 0; both must be at least 1"),
        ({"resize_short": -1}, "resize_short is -1"),
        ({"resize_short": 8, "quality": 101}, "quality is 101"),
    ):
        with pytest.raises(ShardError, match=message):
            write_shards([(b"x", "png", 0, "k")], tmp_path / "x", total=1, class_names=("a",), source="s", license="MIT", **wrong)
    assert not (tmp_path / "x").exists()


def test_a_sample_s_own_entries_are_in_its_json(tmp_path: Path) -> None:
    import webdataset

    sample = Sample(b"x", "webp", 0, "k", {"file": "a/b.webp"})
    index = write_shards([sample], tmp_path, total=1, class_names=("cat",), source="s", license="MIT")
    (theirs,) = webdataset.WebDataset(str(tmp_path / index.shards[0].name), shardshuffle=False)
    assert json.loads(theirs["json"]) == {"key": "k", "label": 0, "class_name": "cat", "file": "a/b.webp"}
    assert theirs["webp"] == b"x"
    assert index.table["extension"].tolist() == [b"webp"]


def test_default_workers_are_the_processors_up_to_eight() -> None:
    assert default_workers() == min(len(os.sched_getaffinity(0)), 8)


def test_images_of_an_array_are_those_of_its_rows() -> None:
    from PIL import Image

    images_NHW = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    part = ArrayImages(images_NHW, np.array([5, 6, 7]), np.array([2, 0]), "p").subset(np.array([1, 0]))
    assert [(part[i].label, part[i].key) for i in range(2)] == [(5, "p-000000"), (7, "p-000002")]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(part[0].image))), images_NHW[0])
