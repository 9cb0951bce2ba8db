"""Classify one image of a shard folder with an exported model, using transformers alone (no import of m2mkd_ds).

    python scripts/classify.py EXPORTED_FOLDER SHARD_FOLDER

This is all that somebody who is handed the exported folder needs.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageClassification, pipeline


def first_image(shards: Path) -> tuple[Image.Image, str]:
    """The first picture of the first shard, and its name there. Raises ValueError when the folder has none."""
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file and member.name.lower().endswith((".png", ".jpg", ".jpeg")):
                    return Image.open(io.BytesIO(file.read())).convert("RGB"), f"{path.name}/{member.name}"
    raise ValueError(f"{shards}: no .tar file with a .png or .jpg image in it")


def main(folder: Path, shards: Path) -> None:
    # trust_remote_code: the folder brings its own model files, which transformers has to run.
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    print(f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters from {folder}")
    image, name = first_image(shards)
    classify = pipeline("image-classification", model=str(folder), trust_remote_code=True, device="cpu")
    print(f"{name}:")
    for guess in classify(image, top_k=3):
        print(f"  {guess['score']:6.1%}  {guess['label']}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
