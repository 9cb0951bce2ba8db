"""Facts of Icons-K on a tiny package of hand-made sets: licences, classes, copies, the split by set; and of the perceptual hash."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
from PIL import Image, ImageDraw

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.source_options import SourceOptions
from m2mkd_ds.data.sources.icon_sets import Icon, choose, class_of, read_sets
from m2mkd_ds.data.sources.icons import hold_out_sets
from m2mkd_ds.data.sources.near_duplicates import distinct, perceptual_hashes
from m2mkd_ds.data.sources.registry import make_source

CIRCLE = '<circle cx="{x}" cy="12" r="{r}" fill="currentColor"/>'
BOX = '<rect x="{x}" y="4" width="{r}" height="{r}" fill="currentColor"/>'
CROSS = '<path d="M{x} 4L20 {r}M20 4L4 20" stroke="#d02020" stroke-width="{w}"/>'


def icon_set(prefix: str, spdx: str, icons: dict[str, str], **more: Any) -> dict[str, Any]:
    info = {"name": prefix.title(), "author": {"name": f"Ms {prefix}"}, "license": {"spdx": spdx, "url": f"https://{prefix}.example"}}
    return {
        "prefix": prefix,
        "info": info,
        "icons": {name: {"body": body} for name, body in icons.items()},
        "width": 24,
        "height": 24,
        **more,
    }


def six_sets() -> list[dict[str, Any]]:
    """Sets a to f under MIT or CC-BY with `dot`, `box` and `cross` drawn differently; g copies a; h may not be used."""
    sets = []
    for number, prefix in enumerate("abcdef"):
        icons = {
            "dot-outline": CIRCLE.format(x=5 + 2 * number, r=3 + number),
            "box-bold-24": BOX.format(x=2 + number, r=5 + 2 * number),
            "cross": CROSS.format(x=2 + 2 * number, r=12 + 2 * number, w=1 + number),
            f"rare-{prefix}": BOX.format(x=1, r=20),
        }
        sets.append(icon_set(prefix, "CC-BY-4.0" if prefix == "b" else "MIT", icons))
    sets[0]["aliases"] = {"dot": {"parent": "dot-outline", "rotate": 1}}
    sets[1]["icons"]["box-duotone"] = {"body": f"{BOX.format(x=1, r=3)}<animate attributeName='x'/>"}
    sets[2]["icons"]["dot-large"] = {"body": CIRCLE.format(x=3, r=2), "hidden": True}
    sets[3]["icons"]["cross-filled"] = {"body": '<path d="M0 0"/>'}  # shows nothing
    sets.append(icon_set("g", "MIT", {"dot": CIRCLE.format(x=5, r=3), "cross-line": CROSS.format(x=2, r=12, w=1.3)}))
    sets.append(icon_set("h", "CC-BY-NC-4.0", {"dot": CIRCLE.format(x=20, r=2)}))
    return sets


def package(root: Path, sets: list[dict[str, Any]]) -> Path:
    (root / "package" / "json").mkdir(parents=True)
    for tree in sets:
        (root / "package" / "json" / f"{tree['prefix']}.json").write_text(json.dumps(tree))
    return root


def test_icons_from_folder_and_archive(tmp_path: Path) -> None:
    folder = package(tmp_path / "npm", six_sets())
    (folder / "package" / "package.json").write_text("{}")
    with tarfile.open(tmp_path / "json.tgz", "w:gz") as tar:
        tar.add(folder / "package", "package")
    options = SourceOptions(num_classes=3, image_size=48, validation_share=0.34)
    fingerprints = []
    for name, path in (("a", folder), ("b", tmp_path / "json.tgz"), ("c", folder / "package" / "json")):
        train, validation = make_source("icons", tmp_path / name, path=path, options=options)
        fingerprints.append((train.fingerprint, validation.fingerprint))
    assert len(set(fingerprints)) == 1
    assert train.class_names == ("box", "cross", "dot")
    keys = [{index.read(i)[2] for i in range(len(index))} for index in (train, validation)]
    drawn = {f"{prefix}/{name}" for prefix in "abcdef" for name in ("dot-outline", "box-bold-24", "cross")}
    # g's dot is a's, pixel for pixel, and its cross is a's with a line a little wider.
    assert keys[0] | keys[1] == drawn
    prefixes = [{key.partition("/")[0] for key in part} for part in keys]
    assert not prefixes[0] & prefixes[1]
    assert len(prefixes[1]) == 2  # 0.34 of six sets
    for index in (train, validation):
        assert set(index.labels_N.tolist()) == {0, 1, 2}
        assert index.license == "by icon set, see LICENCES.json: CC-BY-4.0, MIT"
        for number in range(len(index)):
            image = Image.open(io.BytesIO(index.read(number)[0]))
            assert (image.mode, image.size) == ("RGB", (48, 48))
            assert image.getpixel((0, 0)) == (255, 255, 255)
    licences = json.loads((tmp_path / "a" / "LICENCES.json").read_text())["sets"]
    assert [row["set"] for row in licences] == list("abcdef")
    assert licences[1] == {
        "set": "b", "name": "B", "author": "Ms b", "licence": "CC-BY-4.0", "licence_url": "https://b.example", "icons": 3,
        "part": "validation" if "b" in prefixes[1] else "train",
    }  # fmt: skip


def test_a_file_of_somebody_s_is_not_replaced_by_the_licences(tmp_path: Path) -> None:
    folder = package(tmp_path / "npm", six_sets())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "LICENCES.json").write_text("mine")
    with pytest.raises(ShardError, match="LICENCES.json: has another content than these shards need; choose another folder"):
        make_source("icons", tmp_path / "out", path=folder, options=SourceOptions(num_classes=3))
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_drawing_lies_in_the_middle_of_its_square(tmp_path: Path) -> None:
    """A set of 20 by 10 units, filled: a band of half the height."""
    band = '<rect x="0" y="0" width="20" height="10" fill="currentColor"/>'
    sets = six_sets()
    sets.append(icon_set("wide", "MIT", {"cross": band}, width=20, height=10))
    train, validation = make_source("icons", tmp_path / "out", path=package(tmp_path / "npm", sets), options=SourceOptions(num_classes=3))
    found = {key: data for index in (train, validation) for data, _, key in (index.read(i) for i in range(len(index)))}
    grey_HW = np.asarray(Image.open(io.BytesIO(found["wide/cross"])).convert("L"))
    assert (grey_HW[17:47] == 0).all()
    assert (grey_HW[:15] == 255).all()
    assert (grey_HW[49:] == 255).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bell", "bell"),
        ("bell-outline", "bell"),
        ("arrow-left-bold-24", "arrow-left"),
        ("home-16px", "home"),
        ("outline", "outline"),  # a name is never used up
        ("24-7", ""),
        ("chart-2-filled", "chart"),
    ],
)
def test_classes_are_names_without_words_of_style(name: str, expected: str) -> None:
    assert class_of(name) == expected


def test_the_most_widely_drawn_names_are_chosen_and_too_many_refused(tmp_path: Path) -> None:
    sets = list(read_sets(package(tmp_path, six_sets()) / "package" / "json"))
    assert [icon_set.prefix for icon_set in sets] == list("abcdefg")
    assert choose(sets, 2)[0] == ("cross", "dot")  # in seven sets; box is in six
    with pytest.raises(ShardError, match="num_classes is 4; 3 icon names are drawn in more than one set"):
        choose(sets, 4)


def test_sets_are_held_out_so_that_both_parts_have_all_classes() -> None:
    # Class 1 is in sets p and q only: just one of them may go.
    icons = [Icon(prefix, "x", 0, "") for prefix in "opqrs"] + [Icon(prefix, "y", 1, "") for prefix in "pq"]
    for seed in range(20):
        held_out = hold_out_sets(icons, 2, 0.4, seed)
        assert len(held_out) == 2
        assert len(held_out & {"p", "q"}) == 1
        assert held_out == hold_out_sets(icons, 2, 0.4, seed)
    assert len({hold_out_sets(icons, 2, 0.4, seed) for seed in range(20)}) > 1
    with pytest.raises(ShardError, match="no 1 of 2 icon sets were found that leave all 2 classes in both parts"):
        hold_out_sets([Icon("p", "x", 0, ""), Icon("q", "y", 1, "")], 2, 0.5, 0)


def drawing(kind: str, width: int = 24) -> np.ndarray:
    """Drawn with 512 pixels a side and made smaller, so that line widths can differ by an eighth of a pixel."""
    image = Image.new("RGB", (512, 512), "white")
    pen = ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse((80, 80, 430, 430), outline="black", width=width)
    elif kind == "box":
        pen.rectangle((80, 110, 400, 430), outline="black", width=width)
    else:
        pen.line((64, 450, 450, 64), fill="black", width=width)
        pen.line((64, 240, 240, 64), fill="black", width=width)
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX))


def test_the_hash_is_the_sign_of_scipy_s_transform() -> None:
    images_NHWC = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    for pixels_HWC, found_B in zip(images_NHWC, perceptual_hashes(images_NHWC), strict=True):
        grey = np.asarray(Image.fromarray(pixels_HWC).convert("L"), dtype=float)
        # Averages over 2x2, rounded as 8-bit images are.
        small = np.floor(grey.reshape(32, 2, 32, 2).mean((1, 3)) + 0.5)
        coefficients_B = scipy.fft.dctn(small, 2)[:16, :16].ravel()[1:]
        assert (found_B == (coefficients_B > np.median(coefficients_B))).mean() > 0.95  # Pillow rounds between the two directions, too


def test_copies_go_and_other_drawings_stay() -> None:
    images = [
        drawing("circle"),
        drawing("box"),
        drawing("lines"),
        drawing("circle"),
        drawing("box", 28),
        drawing("lines", 28),
        drawing("circle", 160),
    ]
    # 3 equals 0. 4 is nearly 1, in another set. 5 is nearly 2, in the same set. 6 is another drawing.
    groups = ["a", "a", "a", "a", "b", "a", "b"]
    assert distinct(np.stack(images), groups).tolist() == [0, 1, 2, 5, 6]
    bits = perceptual_hashes(np.stack(images))
    assert 0 < (bits[1] != bits[4]).sum() <= 20
    assert (bits[0] != bits[1]).sum() > 60
    assert distinct(np.stack(images), groups, near=0).tolist() == [0, 1, 2, 4, 5, 6]


def test_a_picture_that_went_makes_no_other_go() -> None:
    """b is near a, c is near b and not near a: a and c stay."""
    a, b, c = drawing("box", 24), drawing("box", 28), drawing("box", 32)
    bits = perceptual_hashes(np.stack([a, b, c]))
    ab, bc, ac = ((bits[i] != bits[j]).sum() for i, j in ((0, 1), (1, 2), (0, 2)))
    near = int(max(ab, bc))
    assert near < ac
    assert distinct(np.stack([a, b, c]), "xyz", near=near).tolist() == [0, 2]
