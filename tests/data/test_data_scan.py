"""Facts of walking a shard: every layout of others is read as tarfile and webdataset read it, and nothing that is lost goes unsaid."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.shards.scan import ShardFault, ShardRow, ShardScan, make_table, scan_samples, scan_shard, scan_stream, split_name
from m2mkd_ds.data.shards.tar_stream import SummedReader
from tests.data.tar_files import image_members, make_tar


def scan(data: bytes, label_field: str = "") -> ShardScan:
    return scan_samples(io.BytesIO(data), "s.tar", label_field=label_field)


def tar_bytes(tmp_path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    return make_tar(tmp_path / "s.tar", members, tar_format).read_bytes()


def kinds(found: ShardScan) -> list[str]:
    return [fault.kind for fault in found.faults]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_rows_say_what_tarfile_says(tmp_path: Path, tar_format: int) -> None:
    long = "folder/" * (12 if tar_format == tarfile.USTAR_FORMAT else 40) + "k"
    odd = "plain" if tar_format == tarfile.USTAR_FORMAT else "ключ é 漢"
    members = [(f"{key}.{end}", data) for key in ("a", long, odd) for end, data in (("jpg", key.encode() * 99), ("cls", b"2"))]
    path = make_tar(tmp_path / "s.tar", members, tar_format)
    record, rows = scan_shard(path)
    data = path.read_bytes()
    assert (record.name, record.bytes, record.sha256) == ("s.tar", len(data), hashlib.sha256(data).hexdigest())
    with tarfile.open(path) as tar:
        expected = [
            ShardRow(info.offset_data, info.size, 2, zlib.crc32(key.encode() * 99), key, "jpg")
            for key in ("a", long, odd)
            for info in [tar.getmember(f"{key}.jpg")]
        ]
    assert rows == expected
    assert [row["key"].decode() for row in make_table([(0, *row) for row in rows])] == ["a", long, odd]


def test_members_that_belong_to_no_sample_are_ignored_as_webdataset_ignores_them(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    members = [
        ("__meta__/x.cls", b"9"), ("./d/a.JPG", b"1"), ("README", b"read"), ("./d/a.seg.png", b"mask"), ("./d/a.cls", b" 1\n"),
        ("./d/a.txt", b"a caption"), ("b.webp", b"2"), ("b.cls", b"0"),
    ]  # fmt: skip
    with tarfile.open(path, "a") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _, rows = scan_shard(path)
    theirs = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    assert [(row.key, row.label) for row in rows] == [(sample["__key__"], int(sample["cls"])) for sample in theirs]
    assert [(row.key, row.extension) for row in rows] == [("./d/a", "jpg"), ("b", "webp")]


def test_keys_end_at_the_first_dot_of_the_file_name() -> None:
    assert split_name("a.b/c.d.PNG") == ("a.b/c", "d.png")
    assert split_name("n01/n01_7.JPEG") == ("n01/n01_7", "jpeg")
    assert split_name("a") == split_name("d/.hidden.jpg") == split_name("._a.jpg") == split_name("__index__/a.json") == ("", "")


def test_the_label_is_the_cls_member_or_the_named_json_field(tmp_path: Path) -> None:
    info = json.dumps({"label": 5, "kind": "7", "filename": "n0_1.JPEG"}).encode()
    data = tar_bytes(tmp_path, [("a.jpg", b"x"), ("a.cls", b"3"), ("a.json", info), ("b.jpg", b"y"), ("b.json", info)])
    found = scan(data)
    assert [(row.key, row.label) for row in found.rows] == [("a", 3)]
    assert [(fault.kind, fault.key) for fault in found.faults] == [("bad_label", "b")]
    assert [(row.key, row.label) for row in scan(data, "label").rows] == [("a", 5), ("b", 5)]
    assert kinds(scan(data, "kind")) == ["bad_label", "bad_label"]
    assert "field 'absent' None is not a number" in scan(data, "absent").faults[0].message


def test_class_names_come_from_json_members_and_contradictions_are_kept(tmp_path: Path) -> None:
    def sample(key: str, label: int, name: object) -> list[tuple[str, bytes]]:
        return [(f"{key}.jpg", b"x"), (f"{key}.cls", str(label).encode()), (f"{key}.json", json.dumps({"class_name": name}).encode())]

    members = [*sample("a", 0, "cat"), *sample("b", 1, "dog"), *sample("c", 0, "cat"), *sample("d", 1, "eel"), *sample("e", 2, 4)]
    assert scan(tar_bytes(tmp_path, members)).class_names == {0: ("cat",), 1: ("dog", "eel")}
    broken = [("a.jpg", b"x"), ("a.cls", b"0"), ("a.json", b"{no json")]
    assert kinds(scan(tar_bytes(tmp_path, broken))) == []


FAULTY: list[tuple[list[tuple[str, bytes]], str, str]] = [
    ([("b.png", b"1")], "bad_label", r"sample b has members \['png'\]; needed are cls"),
    ([("b.cls", b"1")], "no_image", "one of jpg, jpeg, png, webp"),
    ([("b.png", b"1"), ("b.jpg", b"1"), ("b.cls", b"1")], "no_image", r"members \['cls', 'jpg', 'png'\]"),
    ([("b.png", b"1"), ("b.cls", b"one")], "bad_label", "its label b'one' is not a number"),
    ([("b.png", b"1"), ("b.cls", b"-1")], "bad_label", "its label b'-1' is not a number"),
    ([("b.png", b"1"), ("b.cls", b"")], "bad_label", "its label b'' is not a number"),
    ([("b.png", b"1"), ("b.cls", b"2147483648")], "bad_label", "is not a number from 0 to 2147483647"),
    ([("b.png", b"1"), ("b.cls", b"1"), ("b.png", b"2")], "duplicate_key", "key b comes twice: two members png"),
    ([("between.jpg", b""), ("between.cls", b"1"), ("a.png", b"1"), ("a.cls", b"1")], "duplicate_key", "key a comes twice"),
    ([(b"\xff.png".decode("utf-8", "surrogateescape"), b"1")], "bad_member", r"sample \\xff: png is a file whose name is not UTF-8"),
]


@pytest.mark.parametrize(("members", "kind", "message"), FAULTY)
def test_a_faulty_sample_is_named_and_its_neighbours_are_kept(
    tmp_path: Path, members: list[tuple[str, bytes]], kind: str, message: str
) -> None:
    before, after = [("a.jpg", b"1"), ("a.cls", b"4")], [("z.jpg", b"1"), ("z.cls", b"5")]
    found = scan(tar_bytes(tmp_path, [*before, *members, *after], tarfile.GNU_FORMAT))
    assert [row.key for row in found.rows if row.key != "between"] == ["a", "z"]
    assert kinds(found) == [kind]
    path = tmp_path / "s.tar"
    with pytest.raises(ShardError, match=rf"s\.tar: .*{message}"):
        scan_shard(path)


@pytest.mark.parametrize(
    ("kind", "shown"), [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"), (tarfile.FIFOTYPE, "pipe")]
)
def test_links_are_refused_by_name(tmp_path: Path, kind: bytes, shown: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "a.cls", "b.jpg", "b.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            if name == "b.jpg":
                info.type, info.linkname, info.size = kind, "a.jpg", 0
            tar.addfile(info, io.BytesIO(b"1"))
    found = scan(path.read_bytes())
    assert [row.key for row in found.rows] == ["a"]
    assert kinds(found) == ["bad_member"] and shown in found.faults[0].message and found.faults[0].key == "b"


def test_sparse_files_and_compressed_archives_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with tarfile.open(tmp_path / "p.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    assert "a.jpg is a sparse file" in scan((tmp_path / "p.tar").read_bytes()).faults[0].message
    old = tarfile.TarInfo("b.jpg")
    old.type = tarfile.GNUTYPE_SPARSE
    assert kinds(scan(old.tobuf(tarfile.GNU_FORMAT) + bytes(1024))) == ["unsupported"]
    for mode, shown in (("w:gz", "gzip"), ("w:xz", "xz"), ("w:bz2", "bzip2")):
        with tarfile.open(tmp_path / "c.tar", mode) as tar:
            tar.addfile(tarfile.TarInfo("a.cls"))
        data = (tmp_path / "c.tar").read_bytes()
        found = scan(data.ljust(600, b"\0"))
        assert kinds(found) == ["not_tar"] and f"compressed with {shown}" in found.faults[0].message


def test_what_is_no_tar_is_refused() -> None:
    for data in (b"", b"short", b"<html>" * 200, bytes(range(256)) * 8):
        found = scan(data)
        assert kinds(found) == ["not_tar"] and found.rows == [] and found.record.bytes == len(data)


def test_an_empty_shard_has_no_samples_and_no_faults() -> None:
    record, rows, faults = scan_stream(io.BytesIO(bytes(10240)), "e.tar")
    assert (record.num_samples, record.bytes, rows, faults) == (0, 10240, [], [])


def test_a_shard_cut_anywhere_gives_the_samples_before_the_cut_and_says_so(tmp_path: Path) -> None:
    # Long names, so that records about names are cut too.
    members = [(f"{'d' * 120}/n{i}.{end}", b"x" * size) for i in range(4) for end, size in (("jpg", 700 + i), ("cls", 1), ("json", 30))]
    members = [(name, b"1" if name.endswith("cls") else data) for name, data in members]
    path = make_tar(tmp_path / "s.tar", members, tarfile.GNU_FORMAT)
    data, (_, rows) = path.read_bytes(), scan_shard(path)
    with tarfile.open(path) as tar:
        ends = [info.offset_data + -(-info.size // 512) * 512 for info in tar if info.name.endswith(".cls")]
        last = tar.getmembers()[-1]
        content_end = last.offset_data + 512
    for cut in [*range(0, len(data), 512), *range(1, len(data), 977)]:
        found = scan(data[:cut])
        # A sample whose image and label are there is whole, even when the cut is in its json.
        assert found.rows == rows[: sum(end <= cut for end in ends)], cut
        if cut < content_end + 512:
            assert kinds(found) == ["not_tar" if cut < 512 else "truncated"], cut
            assert "not a complete tar file" in found.faults[0].message or cut < 512
        else:  # one block of the end mark suffices: nothing is lost
            assert kinds(found) == [] and len(found.rows) == 4
        assert found.record.bytes == cut


def test_tarfile_itself_takes_a_cut_between_members_for_the_end(tmp_path: Path) -> None:
    """Why the walk is our own: the library reads half of the samples and raises nothing."""
    path = make_tar(tmp_path / "s.tar", image_members(range(4)))
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:cut])
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 4
    with pytest.raises(ShardError, match="not a complete tar file .*behind sample n001"):
        scan_shard(path)


def test_a_damaged_header_and_joined_archives_are_no_silent_end(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "s.tar", image_members(range(4)))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[4].offset
    whole, _ = scan_shard(path)
    joined = scan(bytes(data) + bytes(data))
    assert len(joined.rows) == 4 and kinds(joined) == ["damaged_tar"] and "joined" in joined.faults[0].message
    data[third + 20] ^= 4
    found = scan(bytes(data))
    assert [row.key for row in found.rows] == ["n000", "n001"]
    assert kinds(found) == ["damaged_tar"] and f"damaged header at byte {third}" in found.faults[0].message
    assert found.record.bytes == whole.bytes and found.record.sha256 == hashlib.sha256(data).hexdigest()


def test_damaged_name_records_end_the_walk(tmp_path: Path) -> None:
    data = tar_bytes(tmp_path, [("ключ.jpg", b"x"), ("ключ.cls", b"1")])
    start = data.index(b" path=")
    length_at = data.rindex(b"\0", 0, start) + 1
    for wrong in (b"00", b"99", b"x1", b"01"):
        found = scan(data[:length_at] + wrong + data[length_at + 2 :])
        assert kinds(found) == ["damaged_tar"] and "PAX record" in found.faults[0].message, wrong
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 2**33
    assert "name record of 8589934592 bytes" in scan(huge.tobuf(tarfile.GNU_FORMAT)).faults[0].message


class Dripping:
    """A stream that gives a few bytes at a time, as sockets do, and cannot seek."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self.largest = data, 0, 0

    def read(self, size: int, /) -> bytes:
        self.largest = max(self.largest, size)
        part = self._data[self._at : self._at + min(size, 1 + self._at % 613)]
        self._at += len(part)
        return part


def test_a_stream_is_read_forward_in_bounded_pieces(tmp_path: Path) -> None:
    data = tar_bytes(tmp_path, [*image_members(range(3)), ("big.jpg", bytes(5_000_000)), ("big.cls", b"1")])
    stream = Dripping(data)
    found = scan_stream(stream, "s.tar")
    assert found == scan_stream(io.BytesIO(data), "s.tar")
    assert found[1][3].crc32 == zlib.crc32(bytes(5_000_000))
    assert stream.largest <= 1 << 20
    reader = SummedReader(Dripping(data))
    assert [len(part) for part in reader.chunks(3 << 20)] == [1 << 20] * 3


def test_visit_gets_every_sound_sample_with_its_bytes(tmp_path: Path) -> None:
    members = image_members(range(3))
    data = tar_bytes(tmp_path, [*members, ("bad.jpg", b"x")])
    seen: list[tuple[str, bytes]] = []
    scan_samples(io.BytesIO(data), "s.tar", visit=lambda row, image: seen.append((f"{row.key}.jpg", image)))
    assert seen == members[::2]


def test_faults_print_with_their_shard() -> None:
    assert str(ShardFault("io", "s.tar", "k", "what")) == "s.tar: what"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["jpg", "cls", "json", "png"])), max_size=9))
def test_in_any_order_of_members_every_group_is_a_row_or_a_fault(names: list[tuple[str, str]]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key, end in names:
            tar.addfile(tarfile.TarInfo(f"{key}.{end}"))
    # Empty members have no label, so every group has a fault, and none is passed over.
    found = scan(file.getvalue())
    # Groups by a plain loop: a new one whenever the key changes.
    groups: list[tuple[str, list[str]]] = []
    for key, end in names:
        if not groups or groups[-1][0] != key:
            groups.append((key, []))
        groups[-1][1].append(end)
    assert found.rows == [] and [fault.key for fault in found.faults] == [key for key, _ in groups]
    kept = [set(ends) for number, (key, ends) in enumerate(groups) if len(set(ends)) == len(ends) and key not in dict(groups[:number])]
    singles = [fault for fault in found.faults if fault.kind != "duplicate_key"]
    assert len(singles) == len(kept)
    for fault, ends in zip(singles, kept, strict=True):
        assert (fault.kind == "no_image") == (len(ends & {"jpg", "png"}) != 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_no_damage_makes_the_walk_raise_or_change_other_samples(data: st.DataObject) -> None:
    """A byte of a header is changed and, half of the time, its checksum made right again."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.jpg", "a.cls", f"{'n' * 150}.jpg", f"{'n' * 150}.cls", "c.jpg", "c.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    whole = scan(file.getvalue())
    assert len(whole.rows) == 3
    broken = bytearray(file.getvalue())
    # Blocks: header and content of a.jpg and a.cls; then the long name's header, its content, the member's header, its content, ...
    start = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 14])) * 512
    broken[start + data.draw(st.integers(0, 511))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        block = broken[start : start + 512]
        block[148:156] = b" " * 8
        broken[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    found = scan(bytes(broken))
    assert found.record.bytes == len(broken) and found.record.sha256 == hashlib.sha256(broken).hexdigest()
    if start >= 4 * 512:
        assert found.rows[:1] == whole.rows[:1]
    if found.record.sha256 != whole.record.sha256 and start >= 8 * 512:
        assert len(found.rows) >= 1
