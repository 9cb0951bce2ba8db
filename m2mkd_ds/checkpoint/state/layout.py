"""Which elements of which weight lie on which rank: arithmetic on numbers, without a process group and without DeepSpeed.

ZeRO-1 and ZeRO-2 lay the parameters of an optimizer group end to end, pad the row to equal parts, and give each rank one part
(`FlatGroup`). ZeRO-3 cuts every parameter by itself, pads each, and lays a rank's pieces end to end (`PartedGroup`):

    FlatGroup    rank 0  [ w0 | w1 | w2..   ]        PartedGroup    rank 0  [ w0 first half  | w1 first half  | ...
                 rank 1  [    ..w2 |   pad  ]                       rank 1  [ w0 second half | w1 second half | ...

"The ranks" are all ranks of the job, or, for experts that are spread, the `data_size` ranks that hold the same share of them. The
*canonical* form of a weight is the whole tensor [E, ...]: share s of `ep_size` holds its elements from s * numel on. Rank
part * ep_size + s of the job holds part `part` of share s. `full_F` is all parts of a share, one after the other.
Shape letters: F elements of all parts, P elements of a part, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

ALIGNMENT = 2
"""ZeRO-1 and -2 pad the row to a multiple of this many elements a rank."""


@dataclass(frozen=True)
class Span:
    """Consecutive elements of one tensor that lie together in one part."""

    name: str
    start: int
    """First element, counted in the flattened share."""
    length: int
    part: int
    offset: int
    """Where in the part they begin."""


@dataclass(frozen=True)
class FlatGroup:
    """The layout of one optimizer group under ZeRO-1 and ZeRO-2, seen from one rank."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    """Of one share: spread experts have E / ep_size in front."""
    part_numel: int
    """P, elements of one rank's part."""
    data_rank: int
    """Which part this rank holds, 0..data_size-1."""
    data_size: int
    ep_rank: int = 0
    """Which share of the experts this rank holds, 0..ep_size-1."""
    ep_size: int = 1
    """Over how many ranks the tensors are spread by their first dimension; 1: every part is of the whole tensors."""

    def __post_init__(self) -> None:
        if self.part_numel * self.data_size < self.numel:
            raise RuntimeError(f"{self.data_size} parts of {self.part_numel} elements cannot hold the {self.numel} of {self.names[0]}, ...")

    @property
    def numel(self) -> int:
        """Elements of a share, without padding."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def canonical_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the whole tensors by name."""
        whole = (s if self.ep_size == 1 else torch.Size((s[0] * self.ep_size, *s[1:])) for s in self.shapes)
        return dict(zip(self.names, whole, strict=True))

    @cached_property
    def numel_of(self) -> dict[str, int]:
        """Elements of each tensor in one share."""
        return {name: shape.numel() for name, shape in zip(self.names, self.shapes, strict=True)}

    @cached_property
    def begin_of(self) -> dict[str, int]:
        """Where each tensor begins in the row."""
        return _ends(self.names, self.numel_of)

    def at(self, rank: int) -> FlatGroup:
        """The same layout, seen from rank `rank` of the job."""
        return replace(self, data_rank=rank // self.ep_size, ep_rank=rank % self.ep_size)

    def find(self, name: str, start: int, stop: int) -> Iterator[Span]:
        """Where the elements [start, stop) of a share's tensor lie, in their order."""
        begin = self.begin_of[name]
        at = start
        while at < stop:
            part, offset = divmod(begin + at, self.part_numel)
            length = min(self.part_numel - offset, stop - at)
            yield Span(name, at, length, part, offset)
            at += length

    def find_whole(self, name: str, start: int, stop: int) -> Iterator[tuple[int, Span]]:
        """Where the elements [start, stop) of the whole tensor lie, in their order: (rank of the job, span)."""
        numel = self.numel_of[name]
        at = start
        while at < stop:
            share, inner = divmod(at, numel)
            end = min(numel, inner + stop - at)
            for span in self.find(name, inner, end):
                yield span.part * self.ep_size + share, span
            at += end - inner

    def held(self) -> Iterator[Span]:
        """What this rank's part holds, in its order; what lies between is padding."""
        first = self.data_rank * self.part_numel
        for name in self.names:
            begin = self.begin_of[name]
            low, high = max(begin, first), min(begin + self.numel_of[name], first + self.part_numel)
            if low < high:
                yield Span(name, low - begin, high - low, self.data_rank, low - first)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors -> full_F (fp32, on the device of the tensors)."""
        row = torch.cat([tensors[name].detach().float().flatten() for name in self.names])
        return torch.nn.functional.pad(row, (0, self.part_numel * self.data_size - row.numel()))

    def split(self, full_F: Tensor) -> dict[str, Tensor]:
        """full_F -> named tensors (views of it)."""
        pieces = full_F[: self.numel].split([shape.numel() for shape in self.shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def local(self, full_F: Tensor) -> Tensor:
        """This rank's part of full_F."""
        return full_F.narrow(0, self.data_rank * self.part_numel, self.part_numel)


@dataclass(frozen=True)
class PartedGroup(FlatGroup):
    """The layout of one sub-group under ZeRO-3."""

    @property
    def piece_numels(self) -> list[int]:
        """Elements of each parameter's piece on one rank, padding included."""
        return [_pieces(shape.numel(), self.data_size) for shape in self.shapes]

    @cached_property
    def begin_of(self) -> dict[str, int]:
        """Where each tensor's piece begins in every part."""
        return _ends(self.names, dict(zip(self.names, self.piece_numels, strict=True)))

    def find(self, name: str, start: int, stop: int) -> Iterator[Span]:
        """Where the elements [start, stop) of a tensor lie, in their order."""
        piece = _pieces(self.numel_of[name], self.data_size)
        at = start
        while at < stop:
            part, inner = divmod(at, piece)
            length = min(piece - inner, stop - at)
            yield Span(name, at, length, part, self.begin_of[name] + inner)
            at += length

    def held(self) -> Iterator[Span]:
        """What this rank's part holds, in its order; what lies between is padding."""
        for name, piece in zip(self.names, self.piece_numels, strict=True):
            low = self.data_rank * piece
            length = min(piece, self.numel_of[name] - low)
            if length > 0:
                yield Span(name, low, length, self.data_rank, self.begin_of[name])

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors -> full_F (fp32, on the device of the tensors)."""
        pieces = []
        for name, piece in zip(self.names, self.piece_numels, strict=True):
            flat = tensors[name].detach().float().flatten()
            pieces.append(torch.nn.functional.pad(flat, (0, piece * self.data_size - flat.numel())).view(self.data_size, piece))
        return torch.cat(pieces, dim=1).flatten()

    def split(self, full_F: Tensor) -> dict[str, Tensor]:
        """full_F -> named tensors (copies)."""
        columns = full_F.view(self.data_size, self.part_numel).split(self.piece_numels, dim=1)
        return {
            name: column.flatten()[: shape.numel()].view(shape)
            for name, column, shape in zip(self.names, columns, self.shapes, strict=True)
        }


LAYOUTS: dict[str, type[FlatGroup]] = {"flat": FlatGroup, "parted": PartedGroup}
"""Layouts by the name that checkpoints call them."""


def layout_kind(layout: FlatGroup) -> str:
    """The name of a layout in LAYOUTS."""
    return next(kind for kind, cls in LAYOUTS.items() if type(layout) is cls)


def lay_out(kind: str, shapes: Mapping[str, Sequence[int]], *, data_size: int, ep_size: int) -> FlatGroup:
    """A group as DeepSpeed would lay it out, from the shapes of whole tensors; seen from rank 0.

    The engine checks DeepSpeed's own numbers, so a wrong guess here costs a reader some seeks and changes no value.
    """
    local = tuple(torch.Size((s[0] // ep_size, *s[1:]) if ep_size > 1 else s) for s in shapes.values())
    if kind == "flat":
        part_numel = ALIGNMENT * _pieces(sum(s.numel() for s in local), ALIGNMENT * data_size)
    else:
        part_numel = sum(_pieces(s.numel(), data_size) for s in local)
    return LAYOUTS[kind](tuple(shapes), local, part_numel, 0, data_size, 0, ep_size)


def _pieces(numel: int, size: int) -> int:
    """Elements of the largest of `size` equal pieces: rounded up."""
    return -(-numel // size)


def _ends(names: Sequence[str], numels: Mapping[str, int]) -> dict[str, int]:
    begins, at = {}, 0
    for name in names:
        begins[name] = at
        at += numels[name]
    return begins
