"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; arXiv 1708.07747): find it, fetch it, parse its IDX files, verify it.

Tried in this order, each miss is logged: a local copy (argument, M2MKD_FASHION_MNIST, the cache folder, the folder of
Debian's package), torchvision's download, Debian's package `dataset-fashion-mnist` fetched and unpacked without root.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import math
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.errors import ShardError

logger = logging.getLogger("m2mkd_ds")

ENVIRONMENT_VARIABLE = "M2MKD_FASHION_MNIST"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts its files, on any machine."""
SOCKET_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 120.0

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

SHAPES: dict[str, tuple[int, ...]] = {
    "train-images-idx3-ubyte": (60000, 28, 28),
    "train-labels-idx1-ubyte": (60000,),
    "t10k-images-idx3-ubyte": (10000, 28, 28),
    "t10k-labels-idx1-ubyte": (10000,),
}

PINNED_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Of the unpacked IDX files. Debian's .gz files are repacked (other md5 than upstream's), their content is upstream's."""


def fashion_mnist_arrays(cache: Path, *, local: Path | None = None) -> dict[str, np.ndarray]:
    """The four uint8 arrays by file name. What had to be fetched stays in `cache`.

    Raises ShardError when no place has the files (each place with its reason), or when the files found are not
    Fashion-MNIST.
    """
    misses = []
    for folder in _local_folders(cache, local):
        if all((folder / f"{name}.gz").is_file() for name in SHAPES):
            logger.info("Fashion-MNIST: local copy in %s", folder)
            return _read_verified(folder)
        misses.append(f"{folder}: not there")
        logger.info("Fashion-MNIST: no local copy in %s", folder)
    fetchers: dict[str, Callable[[Path], Path]] = {
        "torchvision's download": _from_torchvision,
        f"Debian package {DEBIAN_PACKAGE}": _from_debian,
    }
    for what, fetch in fetchers.items():
        logger.info("Fashion-MNIST: trying %s", what)
        with tempfile.TemporaryDirectory(prefix="m2mkd-fashion-") as temporary:
            try:
                folder = fetch(Path(temporary))
                arrays = _read_verified(folder)
            except ShardError as err:
                misses.append(f"{what}: {err}")
                logger.warning("Fashion-MNIST: %s failed: %s", what, err)
                continue
            _keep(folder, cache)
            return arrays
    raise ShardError(
        f"Fashion-MNIST cannot be had; put its four .gz files into a folder and name it in {ENVIRONMENT_VARIABLE}. Tried: "
        + "; ".join(misses)
    )


def _local_folders(cache: Path, local: Path | None) -> list[Path]:
    """A folder that the user names must have the files: then no other place is looked at."""
    if local is not None:
        return _must_exist(local, "path")
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if from_environment:
        return _must_exist(Path(from_environment), ENVIRONMENT_VARIABLE)
    return [cache, DEBIAN_FOLDER]


def _must_exist(folder: Path, named_by: str) -> list[Path]:
    missing = [f"{name}.gz" for name in SHAPES if not (folder / f"{name}.gz").is_file()]
    if missing:
        raise ShardError(f"{folder} (from {named_by}) lacks {', '.join(missing)}; a copy of Fashion-MNIST has these four files")
    return [folder]


def parse_idx(data: bytes, name: str) -> np.ndarray:
    """The uint8 array of an unpacked IDX file: bytes 0 0 8 (uint8) d, then d big-endian int32 sizes, then the values.

    Raises ShardError when head or length are wrong.
    """
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ShardError(f"{name}: begins with {data[:4].hex()}; an IDX file of bytes begins with 000008")
    dims = data[3]
    head = 4 + 4 * dims
    shape = struct.unpack(f">{dims}i", data[4:head]) if len(data) >= head else ()
    if len(shape) != dims or len(data) - head != math.prod(shape):
        raise ShardError(f"{name}: has {len(data)} bytes, its head promises shape {list(shape)}; the file is damaged")
    return np.frombuffer(data, dtype=np.uint8, offset=head).reshape(shape)


def _read_verified(folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for name, shape in SHAPES.items():
        path = folder / f"{name}.gz"
        try:
            data = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as err:
            raise ShardError(f"{path}: not a complete gzip file ({err}); copy it again") from err
        array = parse_idx(data, str(path))
        digest = hashlib.sha256(data).hexdigest()
        if array.shape != shape or digest != PINNED_SHA256[name]:
            raise ShardError(f"{path}: shape {list(array.shape)}, sha256 {digest}; this is not Fashion-MNIST's {name}, shape {list(shape)}")
        arrays[name] = array
    return arrays


def _from_torchvision(temporary: Path) -> Path:
    """torchvision's own download, with a time-out for a silent network."""
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as err:
        raise ShardError(f"torchvision cannot be imported ({err})") from err
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT_S)
    try:
        FashionMNIST(str(temporary), train=True, download=True)
    except (RuntimeError, OSError, http.client.HTTPException) as err:
        raise ShardError(" ".join(str(err).split())) from err
    finally:
        socket.setdefaulttimeout(before)
    return temporary / "FashionMNIST" / "raw"


def _from_debian(temporary: Path) -> Path:
    """`apt-get download` and `dpkg-deb -x`; with package lists of our own when the system has none. No root needed."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise ShardError(f"no {program} here; this is not a Debian or Ubuntu machine")
    try:
        _command(["apt-get", "download", DEBIAN_PACKAGE], temporary)
    except ShardError as err:
        logger.info("Fashion-MNIST: %s; trying once more with fresh package lists", err)
        options = _private_apt(temporary / "apt")
        _command(["apt-get", *options, "update"], temporary)
        _command(["apt-get", *options, "download", DEBIAN_PACKAGE], temporary)
    packages = list(temporary.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    if len(packages) != 1:
        raise ShardError(f"apt-get download left {len(packages)} packages, expected one")
    unpacked = temporary / "unpacked"
    _command(["dpkg-deb", "-x", str(packages[0]), str(unpacked)], temporary)
    return unpacked / DEBIAN_FOLDER.relative_to("/")


def _private_apt(state: Path) -> list[str]:
    """Options that let a user without root rights keep package lists in `state`."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    user = os.environ.get("USER", "root") if os.geteuid() else "root"
    settings = {"Dir::State::lists": state / "lists", "Dir::Cache": state / "cache", "APT::Sandbox::User": user}
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def _command(command: list[str], folder: Path) -> None:
    """Run a program with a time-out. Raises ShardError with the last line it wrote."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except subprocess.CalledProcessError as err:
        last = (err.stderr or err.stdout or "no message").strip().splitlines()[-1:]
        raise ShardError(f"`{' '.join(command)}` ended with {err.returncode}: {''.join(last)}") from err
    except subprocess.TimeoutExpired as err:
        raise ShardError(f"`{' '.join(command)}` did not end within {COMMAND_TIMEOUT_S:.0f} s") from err


def _keep(folder: Path, cache: Path) -> None:
    """Copy the four files into the cache folder, so that the next run needs no network."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in SHAPES:
        with AtomicFile(cache / f"{name}.gz") as file:
            file.write((folder / f"{name}.gz").read_bytes())
