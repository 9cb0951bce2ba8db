"""`m2mkd shards index | verify | info`: index shards of others, read everything again, and say what a folder holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from m2mkd_ds.cli.app import out, shards_app
from m2mkd_ds.config import ConfigError
from m2mkd_ds.logs import setup_logging

if TYPE_CHECKING:
    from m2mkd_ds.data.shards.verify import ShardReport

_MAX_LINES = 20


@shards_app.command
def index(
    shards: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(help_behavior_hint="(required)")],
    /,
    *,
    out_dir: Annotated[Path | None, tyro.conf.arg(name="out")] = None,
    split: str = "",
    class_names: Path | None = None,
    num_classes: int = 0,
    label_field: str = "",
    allow_bad: int = 0,
    source: str = "",
    license: str = "unknown",
    workers: int = 0,
    deadline: float = 60.0,
) -> None:
    """Index webdataset shards that lie somewhere: samples, offsets, checksums; the shards stay as they are.

    Args:
        shards: Folder of *.tar, glob, pattern such as 'x-{0000..1023}.tar', or http(s) URL of these kinds; several are possible.
        out_dir: Folder for the index; by default the one that the shards are in.
        split: Split of the folder's _info.json, when it has several.
        class_names: File of class names: a JSON list, a JSON object of number and name, or one a line.
        num_classes: Number of classes; by default as many as there are names, or the largest label + 1.
        label_field: Field of the JSON members that holds the label; by default the label is the .cls member.
        allow_bad: Damaged samples that may be left out; they are listed in OUT/bad.jsonl.
        source: What the images are, for the index.
        license: Licence of the images, for the index.
        workers: Processes; 0: one a CPU core, at most 8.
        deadline: Seconds that a remote read is tried again.
    """
    from m2mkd_ds.data.shard_files import Access
    from m2mkd_ds.data.shards.foreign import IndexRequest, index_shards

    setup_logging()
    request = IndexRequest(
        shards=shards,
        out=out_dir,
        split=split,
        class_names=_read_names(class_names) if class_names else (),
        num_classes=num_classes,
        label_field=label_field,
        allow_bad=allow_bad,
        source=source,
        license=license,
    )
    made = index_shards(request, workers=workers, access=Access(deadline_s=deadline))
    out(f"{made.folder}: {made.num_samples} images, {made.num_classes} classes, fingerprint {made.fingerprint[:16]}")


def _read_names(path: Path) -> tuple[str, ...]:
    from m2mkd_ds.data.errors import ShardError
    from m2mkd_ds.data.shards.interop import class_list

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise ShardError(
            f"--class-names {path}: cannot be read ({err.strerror}); give a JSON list, a JSON object of number and name, or a text file "
            "with a name a line"
        ) from None
    if path.suffix == ".json":
        try:
            tree = json.loads(text)
        except ValueError as err:
            raise ShardError(f"{path}: not JSON ({err}); give a JSON list, or a text file with a name a line") from None
    else:
        tree = text.splitlines()
    names = class_list(tree, str(path))
    if not names or "" in names:
        raise ShardError(f"{path}: a class name is empty; give one for every class number from 0")
    return names


@shards_app.command
def verify(
    folder: tyro.conf.Positional[str],
    /,
    *,
    decode: bool = True,
    report: Path | None = None,
    workers: int = 0,
    deadline: float = 60.0,
) -> None:
    """Read everything again: SHA-256 of every shard, CRC-32, label and pixels of every sample. Exit code 1 when anything is wrong.

    Args:
        folder: Folder or URL that holds index.json.
        decode: Decode every image (--no-decode: checksums and labels only).
        report: File for all faults, one JSON object a line: kind, shard, key, message, sample.
        workers: Processes; 0: one a CPU core, at most 8.
        deadline: Seconds that a remote read is tried again.
    """
    from m2mkd_ds.data.atomic import AtomicFile
    from m2mkd_ds.data.shard_files import Access
    from m2mkd_ds.data.shards.foreign import fault_line
    from m2mkd_ds.data.shards.verify import verify_shards

    setup_logging()
    if report is not None and not report.parent.is_dir():
        raise ConfigError(f"--report {report}: there is no folder {report.parent}; make it, or choose another one")
    reports = verify_shards(folder, workers=workers, decode=decode, access=Access(deadline_s=deadline))
    out(verify_text(reports))
    faults = [fault for shard in reports for fault in shard.faults]
    if report is not None:
        with AtomicFile(report) as file:
            file.write("".join(map(fault_line, faults)).encode())
    if faults:
        sys.exit(1)


def verify_text(reports: list[ShardReport]) -> str:
    """A line a bad shard, and a summary."""
    from collections import Counter

    lines = []
    bad = [shard for shard in reports if shard.faults]
    for shard in bad[:_MAX_LINES]:
        kinds = Counter(fault.kind for fault in shard.faults)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        # The first that names a sample says most.
        first = next((fault for fault in shard.faults if fault.sample is not None), shard.faults[0])
        lines.append(f"{shard.shard}: {counted}: {first.message}")
    if len(bad) > _MAX_LINES:
        lines.append(f"... and {len(bad) - _MAX_LINES} more bad shards")
    samples = {(fault.shard, fault.sample) for shard in bad for fault in shard.faults if fault.sample is not None}
    unread = sum(shard.num_samples for shard in bad if any(fault.kind == "io" and fault.sample is None for fault in shard.faults))
    size = sum(shard.num_bytes for shard in reports)
    lines += [
        f"{'':8}{'all':>12}{'bad':>12}",
        f"{'shards':8}{len(reports):>12}{len(bad):>12}",
        f"{'samples':8}{sum(shard.num_samples for shard in reports):>12}{len(samples) + unread:>12}",
        f"{'MB read':8}{size / 1e6:>12,.1f}",
    ]
    return "\n".join(lines)


@shards_app.command
def info(
    folder: tyro.conf.Positional[str],
    /,
    *,
    classes: bool = False,
    sheet: Path | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Say what a folder of shards holds.

    Args:
        folder: Folder or URL that holds index.json.
        classes: List every class with its number of images.
        sheet: PNG file for a contact sheet of 100 samples.
        seed: Chooses the samples of the sheet, and the images that are opened to learn their sizes.
        json: Print JSON.
    """
    from m2mkd_ds.data.index import ShardIndex
    from m2mkd_ds.data.remote.addresses import is_remote
    from m2mkd_ds.data.shards.contact_sheet import write_contact_sheet
    from m2mkd_ds.data.shards.summary import summarize, summary_json, summary_text

    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ConfigError(f"--sheet {sheet}: the contact sheet is a PNG; end it in .png")
    # Of shards elsewhere only the index is needed; the sizes of images are looked up where samples can be read.
    loaded = ShardIndex.load_unchecked(folder)
    if not is_remote(loaded.base):
        loaded = ShardIndex.load(folder)
    summary = summarize(loaded, seed=seed)
    out(summary_json(summary) if json else summary_text(summary, all_classes=classes))
    if sheet is not None:
        write_contact_sheet(loaded, sheet, seed=seed)
