"""A contact sheet: one PNG with samples of a folder of shards in a grid, each with the name of its class."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.decode import UNDECODABLE
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.order import permutation

TILE = 96
CAPTION = 14
GAP = 4
_BACKGROUND, _INK, _DAMAGED = (255, 255, 255), (40, 40, 40), (200, 60, 60)


def sheet_samples(index: ShardIndex, count: int, seed: int) -> list[int]:
    """Up to `count` sample numbers in an order given by `seed`: one of each class, then a second of each, and so on; sorted by class."""
    order = permutation(seed, 0, index.num_samples).tolist()
    seen: dict[int, int] = {}
    ranked = []
    for place, sample in enumerate(order):
        label = int(index.labels_N[sample])
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], place, sample))
    chosen = [sample for _, _, sample in sorted(ranked)[:count]]
    return sorted(chosen, key=lambda sample: (int(index.labels_N[sample]), sample))


def contact_sheet(index: ShardIndex, *, columns: int = 10, rows: int = 10, seed: int = 0) -> Image.Image:
    """Samples of `index` in a grid, class by class; the same picture for the same data and seed. A damaged image is a red cross."""
    if columns < 1 or rows < 1:
        raise ShardError(f"a contact sheet of {columns} columns and {rows} rows; both must be at least 1")
    samples = sheet_samples(index, columns * rows, seed)
    used = max(1, -(-len(samples) // columns))
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, used * (TILE + CAPTION + GAP) + GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for place, sample in enumerate(samples):
        row, column = divmod(place, columns)
        left, top = GAP + column * (TILE + GAP), GAP + row * (TILE + CAPTION + GAP)
        tile = _tile(index, sample)
        if tile is None:
            box = (left, top, left + TILE - 1, top + TILE - 1)
            draw.rectangle(box, outline=_DAMAGED)
            draw.line(box, fill=_DAMAGED, width=2)
            draw.line((box[0], box[3], box[2], box[1]), fill=_DAMAGED, width=2)
        else:
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        draw.text((left, top + TILE), _fitting(index.class_names[int(index.labels_N[sample])], font), fill=_INK, font=font)
    return sheet


def write_contact_sheet(index: ShardIndex, path: Path, *, columns: int = 10, rows: int = 10, seed: int = 0) -> None:
    """Write the contact sheet as a PNG. Raises ShardError when `path` does not end in .png."""
    if path.suffix.lower() != ".png":
        raise ShardError(f"the contact sheet is a PNG, but its name is {path.name!r}; end it in .png")
    sheet = contact_sheet(index, columns=columns, rows=rows, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with AtomicFile(path) as file:
        sheet.save(file, format="PNG")


def _tile(index: ShardIndex, sample: int) -> Image.Image | None:
    """The image inside of a TILE square, small ones enlarged by whole pixels; None when it is damaged."""
    try:
        image = Image.open(io.BytesIO(index.read(sample)[0])).convert("RGB")
    except UNDECODABLE:
        return None
    larger = max(image.size)
    if larger * 2 <= TILE:
        times = TILE // larger
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return ImageOps.contain(image, (TILE, TILE), Image.Resampling.BILINEAR)


def _fitting(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a class name as fits under a tile; letters that the built-in font may lack become question marks."""
    text = name.encode("ascii", "replace").decode()
    while text and font.getlength(text) > TILE:
        text = text[:-1]
    return text
