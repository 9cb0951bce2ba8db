"""Facts of indexing shards of others: deterministic, resumable, nothing damaged goes in unseen."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from webdataset import ShardWriter

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.data.shards.foreign import IndexRequest, index_shards
from m2mkd_ds.data.shards.shard_list import ShardStream, list_shards, open_shard_stream
from tests.data.tar_files import image_file, image_members, make_tar


def build(*shards: str | Path, workers: int = 1, **request: Any) -> ShardIndex:
    access = Access(deadline_s=1.0)  # the servers of these tests answer at once, or never will
    return index_shards(IndexRequest(shards=tuple(map(str, shards)), **request), workers=workers, access=access)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 5, 0 and 4 samples with labels number % 3."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, numbers in (("x-0000", range(5)), ("x-0001", range(0)), ("x-0002", range(5, 9))):
        make_tar(folder / f"{name}.tar", image_members(numbers))
    return folder


def everything(index: ShardIndex) -> list[tuple[bytes, int, str]]:
    return [index.read(number) for number in range(len(index))]


EXPECTED = [(image_file(number), number % 3, f"n{number:03d}") for number in range(9)]


def test_every_sample_is_read_through_the_index(shards: Path, tmp_path: Path) -> None:
    here = build(shards)
    assert everything(ShardIndex.load(shards)) == EXPECTED and here.shard_sizes == (5, 0, 4) and here.base == str(shards)
    there = build(shards, out=tmp_path / "elsewhere", source="photos", license="CC0-1.0")
    loaded = ShardIndex.load(tmp_path / "elsewhere")
    assert everything(loaded) == EXPECTED and Path(loaded.base) == shards
    assert (loaded.source, loaded.license, loaded.class_names) == ("photos", "CC0-1.0", ("0", "1", "2"))
    assert here.fingerprint == there.fingerprint
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["_info.json", "index.json", "index.npy", "wids.json"]
    assert f"shard {shards}/x-0002.tar, key n007" in loaded.describe(7)
    (shards / "x-0001.tar").unlink()
    with pytest.raises(ShardError, match=r"shards/x-0001.tar: shard is missing"):
        ShardIndex.load(tmp_path / "elsewhere")


def test_a_relative_base_counts_from_the_index(shards: Path, tmp_path: Path) -> None:
    build(shards, out=tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": "../shards"}))
    assert everything(ShardIndex.load(tmp_path / "index")) == EXPECTED


def test_neither_order_of_arguments_nor_processes_change_the_index(shards: Path, tmp_path: Path) -> None:
    paths = sorted(map(str, shards.glob("*.tar")))
    one = build(*paths, out=tmp_path / "a", workers=1)
    two = build(*reversed(paths), paths[0], f"file://{shards}/x-{{0000..0002}}.tar", out=tmp_path / "b", workers=2)
    glob = build(f"{shards}/x-*.tar", out=tmp_path / "c")
    assert one.fingerprint == two.fingerprint == glob.fingerprint
    for name in ("index.npy", "index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (shards / "x-0001.tar").write_bytes(bytes(512 * 4))
    assert build(shards, out=tmp_path / "d").fingerprint != one.fingerprint


def test_shards_of_several_folders_get_their_common_folder_as_base(tmp_path: Path) -> None:
    for name, numbers in (("b", range(2)), ("a", range(2, 4))):
        (tmp_path / "in" / name).mkdir(parents=True)
        make_tar(tmp_path / "in" / name / "s.tar", image_members(numbers))
    index = build(tmp_path / "in" / "b", tmp_path / "in" / "a", out=tmp_path / "out")
    assert [shard.name for shard in index.shards] == ["a/s.tar", "b/s.tar"] and Path(index.base) == tmp_path / "in"
    assert [key for _, _, key in everything(index)] == ["n002", "n003", "n000", "n001"]


def test_what_webdatasets_shard_writer_makes_is_read_sample_by_sample(tmp_path: Path) -> None:
    written = {}
    with ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            extension = ("jpg", "png", "webp")[number % 3]
            data = image_file(number, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
            key = f"größe/n{number}"
            writer.write({"__key__": key, extension: data, "cls": number % 5, "json": {"caption": "x"}, "txt": "a text"})
            written[key] = (data, number % 5)
    index = build(tmp_path, num_classes=5)
    assert {key: (data, label) for data, label, key in everything(index)} == written
    assert index.shard_sizes == (4, 4, 2)
    assert sorted(set(index.table["extension"].tolist())) == [b"jpg", b"png", b"webp"]


def test_the_timm_layout_with_label_and_names_in_json(tmp_path: Path) -> None:
    def sample(number: int) -> list[tuple[str, bytes]]:
        info = {"label": number + 1, "class_name": f"class {number}", "filename": f"n0_{number}.JPEG"}
        return [
            (f"n0_{number}.jpg", image_file(number)),
            (f"n0_{number}.cls", b"%d" % number),
            (f"n0_{number}.json", json.dumps(info).encode()),
        ]

    make_tar(tmp_path / "t.tar", [member for number in (0, 2) for member in sample(number)])
    assert build(tmp_path, out=tmp_path / "a").class_names == ("class 0", "1", "class 2")
    assert build(tmp_path, out=tmp_path / "b", label_field="label").labels_N.tolist() == [1, 3]
    assert build(tmp_path, out=tmp_path / "c", class_names=("x", "y", "z")).class_names == ("x", "y", "z")
    assert build(tmp_path, out=tmp_path / "d", num_classes=4).class_names == ("class 0", "1", "class 2", "3")
    with pytest.raises(ShardError, match="num_classes is 4, but there are 3 class names"):
        build(tmp_path, out=tmp_path / "e", class_names=("x", "y", "z"), num_classes=4)


def test_contradicting_names_and_absurd_labels_are_refused(tmp_path: Path) -> None:
    named = [("a.jpg", b"x"), ("a.cls", b"0"), ("a.json", b'{"class_name": "cat"}')]
    make_tar(tmp_path / "a.tar", named)
    make_tar(tmp_path / "b.tar", [(name, data.replace(b"cat", b"dog")) for name, data in named])
    with pytest.raises(ShardError, match="b.tar: label 0 is named 'cat' and 'dog'; give names with --class-names"):
        build(tmp_path, out=tmp_path / "out")
    make_tar(tmp_path / "b.tar", [("a.jpg", b"x"), ("a.cls", b"2000000000")])
    with pytest.raises(ShardError, match="the largest label is 2000000000"):
        build(tmp_path, out=tmp_path / "out")
    with pytest.raises(
        ShardError, match=r"1 damaged samples \(1 bad_label\).*\nb.tar: sample a: its label is 2000000000, there are 1 classes"
    ):
        build(tmp_path, out=tmp_path / "out", num_classes=1)


def damaged(folder: Path) -> None:
    """30 samples without label in the first shard; in the last one a cut behind its second sample."""
    bad = [(f"bad{number:02d}.jpg", b"x") for number in range(30)]
    make_tar(folder / "x-0000.tar", [*image_members(range(5)), *bad, ("empty.jpg", b""), ("empty.cls", b"0")])
    last = folder / "x-0002.tar"
    members = image_members(range(5, 9))
    # Each member: one block of header, and its content in whole blocks.
    size = sum(512 + -(-len(data) // 512) * 512 for _, data in members[:4])
    last.write_bytes(last.read_bytes()[: size + 512 + 100])


def test_damage_of_all_shards_is_listed_and_refused(shards: Path) -> None:
    damaged(shards)
    with pytest.raises(ShardError) as caught:
        build(shards)
    lines = str(caught.value).splitlines()
    assert (
        lines[0].startswith("32 damaged samples (30 bad_label, 1 no_image, 1 truncated), allowed are 0; ") and "--allow-bad 32:" in lines[0]
    )
    assert len(lines) == 22 and lines[1].startswith("x-0000.tar: sample bad00 has members ['jpg']") and lines[-1] == "... and 12 more"
    assert not (shards / "index.json").exists()


def test_allowed_damage_is_left_out_and_listed(shards: Path) -> None:
    damaged(shards)
    with pytest.raises(ShardError, match="32 damaged samples"):
        build(shards, allow_bad=31)
    index = build(shards, allow_bad=32)
    assert everything(ShardIndex.load(shards)) == EXPECTED[:7] and index.request["num_bad"] == 32
    listed = [json.loads(line) for line in (shards / "bad.jsonl").read_text().splitlines()]
    assert len(listed) == 32 and listed[0].keys() == {"kind", "shard", "key", "message"}
    assert [(line["kind"], line["shard"], line["key"]) for line in listed[-2:]] == [
        ("no_image", "x-0000.tar", "empty"),
        ("truncated", "x-0002.tar", "n007"),
    ]
    with pytest.raises(ShardError, match=r"differs in allow_bad \(32 were left out\)"):
        build(shards)


def info_of(shards: Path, lengths: dict[str, int], **split: Any) -> None:
    names = list(lengths)
    tree = {"name": "train", "num_samples": sum(lengths.values()), "filenames": names, "shard_lengths": list(lengths.values()), **split}
    (shards / "_info.json").write_text(json.dumps({"splits": {"train": tree}}))


def test_counts_of_info_json_are_compared(shards: Path) -> None:
    info_of(shards, {"x-0000.tar": 5, "x-0001.tar": 0, "x-0002.tar": 5})
    with pytest.raises(ShardError, match=r"x-0002.tar: .*_info.json says 5 samples, the shard has 4; get the shard again"):
        build(shards)
    info_of(shards, {"x-0000.tar": 5, "x-0001.tar": 0, "x-0002.tar": 4}, num_samples=8)
    with pytest.raises(ShardError, match="num_samples 8, but its shard_lengths sum to 9"):
        build(shards)
    info_of(shards, {"x-0000.tar": 5, "x-0001.tar": 0, "x-0002.tar": 4, "x-0003.tar": 4})
    with pytest.raises(ShardError, match="1 of the 4 shards in .*_info.json are missing, first x-0003.tar"):
        build(shards)
    info_of(shards, {"x-0002.tar": 4, "x-0000.tar": 5})
    assert [shard.name for shard in build(shards).shards] == ["x-0000.tar", "x-0002.tar"]


def test_samples_lost_with_a_cut_shard_count_when_info_json_knows_them(shards: Path) -> None:
    damaged(shards)
    info_of(shards, {"x-0002.tar": 1000})
    with pytest.raises(ShardError, match=r"^998 damaged samples \(1 truncated\)"):
        build(shards, allow_bad=997)
    assert len(build(shards, allow_bad=998)) == 2


def test_splits_of_info_json_are_indexed_apart(shards: Path, tmp_path: Path) -> None:
    splits = {
        name: {"name": name, "num_samples": count, "filenames": [file], "shard_lengths": [count], "alt_label": alt}
        for name, file, count, alt in (
            ("train", "x-0000.tar", 5, ""),
            ("validation", "x-0002.tar", 4, ""),
            ("fine", "x-0002.tar", 4, "fine"),
        )
    }
    (shards / "_info.json").write_text(json.dumps({"splits": splits, "class_names": {"1": "b", "0": "a", "2": "c"}}))
    with pytest.raises(ShardError, match="has the splits fine, train, validation; give one with --split"):
        build(shards, out=tmp_path / "t")
    with pytest.raises(ShardError, match="give one with --split"):
        build(shards, out=tmp_path / "t", split="test")
    assert everything(build(shards, out=tmp_path / "t", split="train")) == EXPECTED[:5]
    validation = build(shards, out=tmp_path / "v", split="validation")
    assert everything(validation) == EXPECTED[5:] and validation.class_names == ("a", "b", "c")
    # timm reads the labels of such a split from the named field; these samples have none.
    with pytest.raises(ShardError, match="4 damaged samples .*\n.*needed are json"):
        build(shards, out=tmp_path / "f", split="fine")
    with pytest.raises(ShardError, match="give their folder"):
        build(f"{shards}/*.tar", out=tmp_path / "g", split="train")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"splits": {"a": {}}}', '{"splits": {"a": {"filenames": ["x"], "shard_lengths": [], "num_samples": 0}}}']
)
def test_a_broken_info_json_is_refused(shards: Path, text: str) -> None:
    (shards / "_info.json").write_text(text)
    with pytest.raises(ShardError, match="_info.json: not timm's list of shards"):
        build(shards)


def test_an_index_of_the_same_shards_is_kept_and_of_others_refused(shards: Path, tmp_path: Path) -> None:
    build(shards)
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    build(shards)
    assert before == {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    with pytest.raises(ShardError, match="differs in label_field, class_names; remove its index.json or give another --out"):
        build(shards, label_field="label", class_names=("a", "b", "c"))
    make_tar(shards / "x-0003.tar", image_members(range(3)))
    with pytest.raises(ShardError, match="another index, it differs in shards"):
        build(f"{shards}/*.tar")
    make_tar(shards / "x-0002.tar", [])
    with pytest.raises(ShardError, match="differs in sizes of shards"):
        build(f"{shards}/x-000[0-2].tar")
    (tmp_path / "o").mkdir()
    with pytest.raises(ShardError, match="differs in address, shards"):
        build(make_tar(tmp_path / "o" / "x-0000.tar", []), out=shards)


def refuse_third(address: str, access: Access) -> ShardStream:
    if address.endswith("x-0002.tar"):
        raise OSError("the cable is out")
    return open_shard_stream(address, access)


def only_third(address: str, access: Access) -> ShardStream:
    """Opens all, and lets only the third shard be read."""
    stream = open_shard_stream(address, access)

    class Guarded:
        def read(self, size: int, /) -> bytes:
            assert address.endswith(("x-0002.tar", "info.json")), f"{address} was read again"
            return stream.read(size)

    return ShardStream(Guarded(), stream.stamp, stream.close, stream.num_bytes)


def test_an_interrupted_run_goes_on_where_it_stopped(shards: Path, tmp_path: Path) -> None:
    request = IndexRequest(shards=(str(shards),), out=tmp_path / "out")
    with pytest.raises(ShardError, match=r"x-0002.tar: cannot be read \(the cable is out\); .* finished shards are kept"):
        index_shards(request, workers=1, open_shard=refuse_third)
    assert len(list((tmp_path / "out" / "index.parts").iterdir())) == 2
    index = index_shards(request, workers=1, open_shard=only_third)
    assert index.fingerprint == build(shards).fingerprint
    assert not (tmp_path / "out" / "index.parts").exists()


def test_a_kept_part_of_a_shard_that_changed_is_not_used(shards: Path, tmp_path: Path) -> None:
    request = IndexRequest(shards=(str(shards),), out=tmp_path / "out")
    with pytest.raises(ShardError, match="cannot be read"):
        index_shards(request, workers=1, open_shard=refuse_third)
    make_tar(shards / "x-0000.tar", image_members(range(20, 25)))
    assert [key for _, _, key in everything(build(shards, out=tmp_path / "out"))][:5] == [f"n{number:03d}" for number in range(20, 25)]


def test_wrong_names_are_told(tmp_path: Path, shards: Path) -> None:
    for pattern, message in (
        (str(tmp_path), r"holds no \*\.tar"),
        (f"{shards}/x-{{0000..0009}}.tar", "7 of 10 shards are not there, the first is .*x-0003.tar"),
        (f"{shards}/y-*.tar", "matches no file"),
        (f"{shards}/x-{{0000..0002.tar", "braces cannot be expanded"),
        ("https://host/data/x-*.tar", "name every shard"),
        ("https://host/data", "name every shard"),
    ):
        with pytest.raises(ShardError, match=message):
            list_shards([pattern])
    with pytest.raises(ShardError, match="no shards were named"):
        list_shards([])
    with pytest.raises(ShardError, match="some shards are local and some remote"):
        list_shards([str(shards), "http://host/x.tar"])
    with pytest.raises(ShardError, match="nothing in common"):
        list_shards(["http://a/x.tar", "http://b/x.tar"])
    with pytest.raises(ShardError, match="unknown scheme 'nowhere'"):
        build("nowhere://host/x.tar", out=tmp_path / "o")
    for secret in ("https://host/x.tar?token=abc", "https://me:abc@host/x.tar"):
        with pytest.raises(ShardError, match="give plain addresses") as caught:
            list_shards([secret])
        assert "abc" not in str(caught.value)
    found = list_shards(["https://host/a/{x,y}.tar", "https://host/a/b/z.tar"])
    assert (found.base, found.names) == ("https://host/a/", ("b/z.tar", "x.tar", "y.tar"))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        if self.path == "/forbidden/_info.json" or self.path == "/forbidden/info.json":
            self.send_error(403)
        elif self.path.endswith("short.tar"):
            self.send_response(200)
            self.send_header("Content-Length", "10240")
            self.end_headers()
            self.wfile.write(bytes(5000))
            self.close_connection = True
        else:
            super().do_GET()


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/"
        httpd.shutdown()
        thread.join(timeout=10)


def test_remote_shards_are_indexed_as_local_ones_are(server: str, shards: Path, tmp_path: Path) -> None:
    local = build(shards, out=tmp_path / "local")
    remote = build(f"{server}x-{{0000..0002}}.tar", out=tmp_path / "remote", workers=2)
    assert (remote.fingerprint, remote.base) == (local.fingerprint, server)
    with pytest.raises(ShardError, match="give a folder for their index with --out"):
        build(f"{server}x-0000.tar")
    with pytest.raises(ShardError, match="holds no _info.json with splits; name the shards"):
        build(server, out=tmp_path / "o")
    info_of(shards, {"x-0000.tar": 5, "x-0002.tar": 4})
    assert build(server, out=tmp_path / "by_info").shard_sizes == (5, 4)
    info_of(shards, {"x-0000.tar": 4})
    with pytest.raises(ShardError, match="says 4 samples, the shard has 5"):
        build(f"{server}x-0000.tar", out=tmp_path / "p")


def test_remote_failures_name_the_shard_and_are_no_damaged_samples(server: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="absent.tar: cannot be read .*HTTP 404"):
        build(f"{server}absent.tar", out=tmp_path / "o", allow_bad=9)
    with pytest.raises(ShardError, match=r"short.tar: cannot be read .*ended early|IncompleteRead|short"):
        build(f"{server}short.tar", out=tmp_path / "o", allow_bad=9)
    (shards / "forbidden").mkdir()
    make_tar(shards / "forbidden" / "f.tar", image_members(range(2)))
    assert len(build(f"{server}forbidden/f.tar", out=tmp_path / "f")) == 2
    with pytest.raises(ShardError, match=r"127.0.0.1:9/x.tar"):
        build("http://127.0.0.1:9/x.tar", out=tmp_path / "q")
