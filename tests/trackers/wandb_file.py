"""Reads what W&B keeps offline, by the format's own description: a log in blocks of 32 KiB whose records hold protobuf messages.

Independent of the package's readers; only the message type is theirs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES, FILE_HEADER_BYTES, HEADER = 32 * 1024, 7, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(file: Path) -> Iterator[bytes]:
    """Whole records, put together from their parts."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = FILE_HEADER_BYTES, b""
    while at + HEADER.size <= len(data):
        if BLOCK_BYTES - at % BLOCK_BYTES < HEADER.size:  # too little is left of the block for a header
            at += BLOCK_BYTES - at % BLOCK_BYTES
            continue
        _, size, kind = HEADER.unpack_from(data, at)
        if kind == 0:
            return
        parts += data[at + HEADER.size : at + HEADER.size + size]
        at += HEADER.size + size
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def read(folder: Path) -> tuple[set[str], dict[str, Any], list[dict[str, Any]]]:
    """Ids of the runs below a trainee's folder, their config, and their history lines in order."""
    from wandb.proto import wandb_internal_pb2

    ids: set[str] = set()
    config: dict[str, Any] = {}
    lines = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: (file.stat().st_mtime_ns, file)):
        for packed in payloads(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(packed)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                lines.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item})
    return ids, config, lines
