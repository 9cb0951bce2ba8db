"""Open an old .pth file without running its code, and find the weights in it.

What may come in:
  {'model': state dict, 'model_stages': [state dict a stage], 'optimizer': ..., ...}
      what the trainers of Deep Incubation and m2mKD save: a whole model, a hybrid of modular training, or one student stage
      (then `model_stages` has one entry)
  {'block_state_dict': ..., 'block_index': i, 'divided_depths': [...], 'model_name': ...}
      a teacher module after the split, or a list of these
  a bare state dict, or a list of them, one a stage
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.legacy.layout import LegacyError, stage_depths_of

_log = logging.getLogger("m2mkd_ds")


@dataclass(frozen=True)
class LegacyPart:
    """The weights of one file, or of one entry of a list of modules."""

    where: str
    layout: str
    """Entries that were read, for example `model+model_stages`."""
    tensors: dict[str, Tensor]
    """Keys as in the file, below `model.` or `model_stages.K.`."""
    depths: tuple[int, ...]
    """Blocks per stage of the file itself; one number when the file only says `blocks.N`."""
    knows_stages: bool
    """Whether the file itself tells where its stages begin."""
    block_index: int | None = None
    """Which stage a teacher module is."""
    divided_depths: tuple[int, ...] = ()
    """Blocks per stage of the model that a teacher module was cut from."""
    model_name: str = ""


def load_parts(path: str | Path) -> list[LegacyPart]:
    """The parts of one file: several for a list of modules, else one. Raises LegacyError."""
    return _split(_unpickle(Path(path)), str(path))


def _unpickle(path: Path) -> Any:
    """Read with torch's restricted unpickler. argparse.Namespace is let in: it only holds values, and many files carry one as `args`."""
    if not path.is_file():
        raise LegacyError(f"{path}: no such checkpoint file")
    zipped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, so that optimizer states, twice the size of the weights, are never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as err:
        raise LegacyError(
            f"{path}: refused, because it holds more than tensors and plain data ({_refused(path, zipped, err)}) and reading that could "
            "run code of the file. If you trust its origin, open it there with the program that wrote it and save the weights alone: "
            "torch.save({'model': state_dict}, 'clean.pth')"
        ) from err
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as err:
        raise LegacyError(f"{path}: damaged, or not a file of torch.save ({type(err).__name__}: {err}); get it again") from err


def _refused(path: Path, zipped: bool, err: Exception) -> str:
    """What the reader stumbled over, by name where torch can list it (this lists names, it does not build objects)."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    return ", ".join(sorted(set(names) - {"argparse.Namespace"})) or str(err).splitlines()[0]


def _split(content: Any, where: str) -> list[LegacyPart]:
    """Recognise the format."""
    if isinstance(content, Mapping):
        if "block_state_dict" in content:
            return [_module_part(content, where)]
        if "model" in content or "model_stages" in content:
            return [_trainer_part(content, where)]
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return [_part(where, "state_dict", {"model": content})]
    if isinstance(content, (list, tuple)) and content and all(isinstance(item, Mapping) for item in content):
        if all("block_state_dict" in item for item in content):
            return [_module_part(item, f"{where}[{i}]") for i, item in enumerate(content)]
        return [_part(where, "stage list", {f"model_stages.{i}": item for i, item in enumerate(content)})]
    found = f"keys {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise LegacyError(f"{where}: no weights found ({found}); expected `model`, `model_stages`, `block_state_dict` or a state dict")


def _trainer_part(content: Mapping[str, Any], where: str) -> LegacyPart:
    """A trainer's checkpoint; what is not weights (optimizer, epoch, ...) is named in the log."""
    dicts: dict[str, Any] = {"model": content["model"]} if "model" in content else {}
    stages = content.get("model_stages") or []
    dicts.update({f"model_stages.{i}": stage for i, stage in enumerate(stages)})
    layout = "+".join(name for name, there in (("model", "model" in dicts), ("model_stages", bool(stages))) if there)
    ignored = sorted(str(key) for key in content if key not in ("model", "model_stages"))
    if ignored:
        _log.info("%s: %s are not the model's weights and are left out", where, ", ".join(ignored))
    return _part(where, layout, dicts)


def _module_part(content: Mapping[str, Any], where: str) -> LegacyPart:
    """A teacher module with the fields that say which one it is."""
    lacking = [key for key in ("block_index", "divided_depths") if key not in content]
    if lacking:
        raise LegacyError(f"{where}: a teacher module without {' and '.join(lacking)}, so it is not known which one it is")
    index, divided = int(content["block_index"]), tuple(int(depth) for depth in content["divided_depths"])
    if not 0 <= index < len(divided):
        raise LegacyError(f"{where}: block_index is {index}, but divided_depths {list(divided)} has stages 0 to {len(divided) - 1}")
    part = _part(where, "teacher module", {"model_stages.0": content["block_state_dict"]})
    return LegacyPart(
        part.where, part.layout, part.tensors, part.depths, True, index, divided, model_name=str(content.get("model_name", ""))
    )


def _part(where: str, layout: str, dicts: Mapping[str, Any]) -> LegacyPart:
    """Join the state dicts under their prefixes and count their stages; all ways of counting must agree."""
    tensors: dict[str, Tensor] = {}
    for prefix, state in dicts.items():
        if not isinstance(state, Mapping):
            raise LegacyError(
                f"{where}: {prefix} is a {type(state).__name__}, expected a state dict (a whole pickled module cannot be read)"
            )
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise LegacyError(f"{where}: {prefix}.{name} is a {type(value).__name__}, expected a tensor")
            tensors[f"{prefix}.{name}"] = value
    names = list(tensors)
    counted = {at: depths for at in ("model_stages.", "model.stages.") if (depths := stage_depths_of(names, at))}
    flat = _flat_blocks(names, where)
    depths = next(iter(counted.values()), (flat,))
    wrong = [f"{at}* has {list(d)}" for at, d in counted.items() if d != depths]
    if flat and flat != sum(depths):
        wrong.append(f"model.blocks.* has {flat}")
    if wrong:
        raise LegacyError(f"{where}: copies of the blocks disagree: {next(iter(counted))}* has {list(depths)} blocks, {', '.join(wrong)}")
    if not sum(depths):
        raise LegacyError(f"{where}: no keys such as blocks.0.norm1.weight; the file holds {', '.join(names[:4]) or 'no tensors'}")
    return LegacyPart(where, layout, tensors, depths, knows_stages=bool(counted))


def _flat_blocks(names: Sequence[str], where: str) -> int:
    found = sorted({int(match[1]) for name in names if (match := re.match(r"model\.blocks\.(\d+)\.", name))})
    if found != list(range(len(found))):
        raise LegacyError(f"{where}: model.blocks.* holds blocks {found}, expected 0 to {len(found) - 1}: keys are missing")
    return len(found)
