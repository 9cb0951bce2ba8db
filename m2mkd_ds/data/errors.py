"""What can be wrong with shards and samples, by kind."""

from __future__ import annotations

from typing import Literal

SampleFault = Literal["io", "truncated", "checksum", "undecodable", "bad_label", "transform"]
"""io: the bytes could not be read in time. truncated: the shard ends before the sample does. checksum: other bytes than were indexed.
undecodable: no image. bad_label: no class number, or one that does not exist. transform: augmentation failed (an error of ours,
never of the image: it always stops the run)."""


class ShardError(ValueError):
    """A shard folder that cannot be used or written; the message names the file, what is wrong and what to do."""


class SampleError(ValueError):
    """One damaged sample; the message names shard, key, sample number and, from the loader, the stream position."""

    def __init__(self, message: str, kind: SampleFault = "io") -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, SampleFault]]:
        return type(self), (str(self), self.kind)
