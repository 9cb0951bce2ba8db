"""What `m2mkd bench loader` can be asked. Standard library only: the command line reads this file for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m2mkd_ds.bench import spelled

Reader = Literal["decode_limit", "raw_read", "pil", "fast", "fast_device", "webdataset", "timm", "timm_prefetcher"]
READERS: tuple[Reader, ...] = (
    "decode_limit", "raw_read", "pil", "fast", "fast_device", "webdataset", "timm", "timm_prefetcher",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoaderBench:
    """Shards, batch, workers, readers and how often to measure."""

    images: int = 512
    """Photo-like JPEGs to make, in a temporary folder; a multiple of 8 batches, so that every reader can give whole batches."""
    shards: Path | None = None
    """A folder of shards on this machine (with index.json) to read instead, all of it but the rest of the last batch."""
    batch: int = 32
    """Images a batch."""
    image_size: int = 224
    """Side of the square that comes out, in pixels."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Loader processes; 0 reads in the main process."""
    readers: tuple[Reader, ...] = READERS
    """decode_limit: simplejpeg decodes the whole image, bytes in memory, nothing else. raw_read: our index, bytes in shuffled order.
    pil, fast: our loader with data.decode=pil and fast; fast gives uint8, what comes after it is a GPU's work. fast_device: the same
    and flip, normalisation on this CPU. webdataset: WebDataset(...).decode("pil") with timm's transform. timm: timm's reader and
    loader, float32 from the workers. timm_prefetcher: its fast collate, uint8 from the workers, normalised in the main process."""
    augment: bool = False
    """Measure a second recipe, with RandAugment (rand-m9-mstd0.5-inc1), besides random resized crop and flip."""
    repeats: int = 3
    """Rounds; a round measures every reader once, in another order each time."""
    resume_images: int = 1_281_167
    """Images of the synthetic index that resuming is timed with; 0 leaves that out."""
    resume_shards: int = 1024
    """Shards of that index."""
    seed: int = 0
    """Of photos, crops and the order of measurements."""
    quick: bool = False
    """A first look: 128 images, one round, workers 0 and 1."""
    out: Path | None = None
    """Folder for loader_cpu.json, .md and .svg; without it, only the table is printed."""

    def check(self) -> None:
        """Raises ValueError for numbers that make no measurement."""
        for name, least in (("images", 1), ("batch", 1), ("image_size", 8), ("repeats", 1), ("resume_images", 0), ("resume_shards", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if not self.workers or min(self.workers) < 0 or len(set(self.workers)) != len(self.workers):
            raise ValueError(f"--workers is {' '.join(map(str, self.workers))}; give different numbers from 0 on")
        if not self.readers:
            raise ValueError(f"--readers is empty; give one or several of {', '.join(READERS)}")
        if self.shards is None and self.resolved().images % (8 * self.resolved().batch):
            raise ValueError(
                f"--images is {self.images} and --batch {self.batch}; the photos go into 8 shards of whole batches, so give a multiple of "
                f"{8 * self.batch} images or a smaller batch"
            )

    def resolved(self) -> LoaderBench:
        """With `quick` spelled out."""
        if not self.quick:
            return self
        return spelled.with_quick(self, {"images": 128, "batch": 16, "repeats": 1, "workers": (0, 1)})

    def command(self) -> str:
        """The command line that asks for this; defaults are left out."""
        return spelled.command("loader", self)
