"""The rank files of a checkpoint, format 3: each rank's fp32 masters, optimizer state and moving average, as plain safetensors.

    engine_rank_<r>.safetensors
        group<g>.<kind>     [P]     this rank's part of group g (`layout.py`); kinds: master, exp_avg, exp_avg_sq, ema
        scalar.<kind>       []      what the optimizer keeps once, such as `step`            rank 0 only
        shared.<name>               frozen parameters and buffers, such as router biases     rank 0 only
        metadata                    JSON: the `Description` of the whole checkpoint, the same in every file but for `rank`

So a file says by itself what it is, and any run of elements of any weight is found by arithmetic. Format 2 (`engine_rank_<r>.pt`) is
refused by name and never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.saves.manifest import FileRecord
from m2mkd_ds.checkpoint.state.layout import LAYOUTS, FlatGroup, Span, layout_kind
from m2mkd_ds.checkpoint.state.safetensors_stream import METADATA_KEY, TensorFile, TensorInfo, file_order, info_of, write_stream

__all__ = [
    "Description",
    "FileRecord",
    "Parameter",
    "RankFiles",
    "StoreError",
    "rank_file",
    "rank_tensors",
    "stream_rank_file",
    "write_rank_file",
]

FORMAT = 3
"""Version of the rank files that `write_rank_file` makes."""


@dataclass(frozen=True)
class Parameter:
    """A trainable weight, whatever the shape of the cluster."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    family: int
    """Parameters of one family belong to one optimizer group, as long as experts are not spread."""
    is_expert: bool
    """Whether expert parallelism would spread it by its first dimension."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds, and how it is laid out."""

    size: int
    """Ranks of the job that wrote it."""
    zero_stage: int
    kinds: tuple[str, ...]
    """What is kept of every parameter: `master`, then the optimizer's and the average."""
    parameters: tuple[Parameter, ...]
    """In the module's order."""
    groups: tuple[FlatGroup, ...]
    """Seen from rank 0. `groups[g].at(r)` is rank r's view."""

    @property
    def ep_size(self) -> int:
        """Over how many ranks the experts are spread."""
        return max((group.ep_size for group in self.groups), default=1)

    def to_json(self, rank: int) -> str:
        """The metadata of rank `rank`'s file."""
        groups = [
            {
                "kind": layout_kind(g), "names": list(g.names), "shapes": [list(s) for s in g.shapes],
                "part_numel": g.part_numel, "data_size": g.data_size, "ep_size": g.ep_size,
            }
            for g in self.groups
        ]  # fmt: skip
        head = {"format": FORMAT, "rank": rank, "size": self.size, "zero_stage": self.zero_stage, "kinds": list(self.kinds)}
        return json.dumps(head | {"parameters": [asdict(p) for p in self.parameters], "groups": groups})

    @classmethod
    def from_json(cls, text: str) -> Description:
        """The inverse. Raises KeyError, TypeError or ValueError for a text of something else."""
        tree = json.loads(text)
        groups = []
        for g in tree["groups"]:
            shapes = tuple(torch.Size(shape) for shape in g["shapes"])
            groups.append(LAYOUTS[g["kind"]](tuple(g["names"]), shapes, g["part_numel"], 0, g["data_size"], 0, g["ep_size"]))
        parameters = tuple(Parameter(p["name"], tuple(p["shape"]), p["family"], p["is_expert"]) for p in tree["parameters"])
        return cls(tree["size"], tree["zero_stage"], tuple(tree["kinds"]), parameters, tuple(groups))


def rank_file(folder: Path, rank: int) -> Path:
    """Where rank `rank` of the writing job puts its share."""
    return folder / f"engine_rank_{rank:05d}.safetensors"


def rank_tensors(description: Description, rank: int, once: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What the file of rank `rank` holds; `once` (scalars and shared tensors by their names in the file) only in that of rank 0."""
    parts = {
        f"group{index}.{kind}": TensorInfo(torch.float32, torch.Size((group.part_numel,)))
        for index, group in enumerate(description.groups)
        for kind in description.kinds
    }
    return parts | (dict(once) if rank == 0 else {})


def write_rank_file(folder: Path, description: Description, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, FileRecord]:
    """Write one rank's file out of tensors on the CPU, and force it to disk. Returns {file name: its record}.

    Raises ValueError when `tensors` are not what the description says, OSError for a full disk.
    """
    infos = {name: info_of(value) for name, value in tensors.items()}
    once = {name: info for name, info in infos.items() if name.startswith(("scalar.", "shared."))}
    if infos != rank_tensors(description, rank, once):
        raise ValueError(f"the tensors of rank {rank} are not those of its description: {sorted(infos)[:5]}")
    return stream_rank_file(folder, description, rank, infos, (tensors[name] for name in file_order(infos) if tensors[name].numel()))


def stream_rank_file(
    folder: Path, description: Description, rank: int, infos: Mapping[str, TensorInfo], pieces: Iterable[Tensor]
) -> dict[str, FileRecord]:
    """The same out of a stream of pieces, as for `write_stream`."""
    path = rank_file(folder, rank)
    return {path.name: write_stream(path, infos, pieces, description.to_json(rank))}


class RankFiles:
    """A checkpoint folder, read by runs of elements; a file is opened (its header read) when something in it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises StoreError for files that are missing, damaged, or of another format."""
        self.folder = folder
        self._files: dict[int, TensorFile] = {}
        if not rank_file(folder, 0).exists() and (folder / "engine_rank_00000.pt").exists():
            raise StoreError(
                f"{folder}: its engine_rank_*.pt are of format 2, which this version does not read (it reads format {FORMAT}, "
                ".safetensors): finish that run with the version that wrote it, or start the phase again"
            )
        self.description = _described(TensorFile(rank_file(folder, 0)))
        self.parameters = {p.name: p for p in self.description.parameters}
        self._group_of = {name: i for i, group in enumerate(self.description.groups) for name in group.names}
        first = self.file(0)
        self.scalars = {n.removeprefix("scalar."): first.read(n) for n in sorted(first.tensors) if n.startswith("scalar.")}
        self.shared = {n.removeprefix("shared."): info for n, info in first.tensors.items() if n.startswith("shared.")}

    def file(self, rank: int) -> TensorFile:
        """The file of one rank of the job that wrote the checkpoint, after checking that it belongs to the others."""
        if rank not in self._files:
            file = TensorFile(rank_file(self.folder, rank))
            if _described(file) != self.description or json.loads(file.metadata[METADATA_KEY])["rank"] != rank:
                raise StoreError(f"{file.path}: belongs to another checkpoint than the file of rank 0 beside it")
            for name, info in rank_tensors(self.description, rank, {}).items():
                if file.tensors.get(name) != info:
                    raise StoreError(f"{file.path}: damaged, {name} should be {info.shape.numel()} fp32 elements")
            self._files[rank] = file
        return self._files[rank]

    def where(self, name: str, start: int, stop: int) -> Iterator[tuple[int, Span]]:
        """Ranks and places of the elements [start, stop) of a whole tensor, in their order."""
        return self.description.groups[self._group_of[name]].find_whole(name, start, stop)

    def runs(self, kind: str, name: str, start: int, stop: int) -> Iterator[Tensor]:
        """The elements [start, stop) of the whole tensor `name`, flattened, in pieces that follow one another."""
        for rank, span in self.where(name, start, stop):
            yield from self.file(rank).runs(f"group{self._group_of[name]}.{kind}", span.offset, span.length)

    def read_shared(self, name: str) -> Tensor:
        """A frozen parameter or buffer."""
        return self.file(0).read(f"shared.{name}")

    def runs_shared(self, name: str) -> Iterator[Tensor]:
        """The same, flattened, in pieces that follow one another."""
        return self.file(0).runs(f"shared.{name}", 0, self.shared[name].shape.numel())

    def runs_held(self, kind: str, layout: FlatGroup) -> Iterator[tuple[int, Tensor]]:
        """What a rank holds of one kind under another layout (`layout`, seen from it): (place in its part, elements), in order.

        Places that are left out are padding. Opens only the files that hold something of it.
        """
        for span in layout.held():
            at = layout.ep_rank * layout.numel_of[span.name] + span.start
            offset = span.offset
            for run in self.runs(kind, span.name, at, at + span.length):
                yield offset, run
                offset += run.numel()

    def check_held(self, layout: FlatGroup) -> None:
        """Open every file that `runs_held` will read, so that a missing or foreign one is named before anything has changed."""
        for span in layout.held():
            at = layout.ep_rank * layout.numel_of[span.name] + span.start
            for rank, _ in self.where(span.name, at, at + span.length):
                self.file(rank)


def _described(file: TensorFile) -> Description:
    try:
        text = file.metadata[METADATA_KEY]
        if json.loads(text)["format"] != FORMAT:
            raise StoreError(f"{file.path}: an engine file of format {json.loads(text)['format']}; this version reads format {FORMAT}")
        return Description.from_json(text)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as err:
        raise StoreError(f"{file.path}: not an engine file of this program ({type(err).__name__}: {err})") from err
