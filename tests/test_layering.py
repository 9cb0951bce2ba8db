"""Who imports whom, read from the syntax trees and checked against the table of docs/design.md, section 3.

Independent of ruff's banned-api rules, which can only open or close whole files. A fake tree with one wrong import of each
kind shows that the checker sees them.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# room -> what it may import besides itself, `config` and `logs`; a dotted entry opens that one file only.
MAY_IMPORT = {
    "config": set(),
    "checkpoint_config": set(),
    "data_config": set(),
    "phase_config": set(),
    "router_config": set(),
    "teacher_config": set(),
    "watch_config": set(),
    "logs": set(),
    "recipes": set(),
    "trackers": set(),
    "data": set(),
    "moe": set(),
    "models": {"moe"},
    "distributed": {"moe", "checkpoint.state.layout", "checkpoint.state.rank_files"},
    "checkpoint": {"models"},
    "distill": {"models", "checkpoint.mapping"},
    "teacher": {"distill", "models", "data", "checkpoint.mapping"},
    "train": {"distill", "teacher", "models", "moe", "data", "checkpoint", "distributed", "trackers"},
    "bench": {
        "moe", "models", "data", "teacher", "distributed", "distill", "train.steps", "train.optim", "checkpoint.atomic",
        "checkpoint.saves.async_commit", "checkpoint.saves.attempt", "checkpoint.saves.commit",
    },
    "report": {"models", "checkpoint"},
    "planner": {"models", "moe", "checkpoint", "distill.pairs"},
    "timm_models": {"models", "checkpoint", "recipes"},
    "__main__": {"cli"},
}  # fmt: skip
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"__main__"}
OPEN_TO_ALL = {
    "config", "checkpoint_config", "data_config", "phase_config", "router_config", "teacher_config", "watch_config", "logs",
}  # fmt: skip

# third party -> the files or folders that may import it.
DOORS = {
    "deepspeed": ("m2mkd_ds/distributed/",),
    "tutel": ("m2mkd_ds/distributed/external/tutel.py", "m2mkd_ds/moe/backends/tutel_dispatch.py"),
    "scattermoe": ("m2mkd_ds/distributed/external/scattermoe.py",),
    "triton": ("kernels/m2mkd_kernels/",),
    "webdataset": ("m2mkd_ds/data/", "m2mkd_ds/bench/loader_peers.py"),
    "timm": (
        "m2mkd_ds/models/vit.py", "m2mkd_ds/models/variants.py", "m2mkd_ds/models/timm_vmoe.py", "m2mkd_ds/timm_models.py",
        "m2mkd_ds/checkpoint/timm_export.py",
        "m2mkd_ds/data/transforms.py", "m2mkd_ds/bench/loader_peers.py",
    ),
    "safetensors": ("m2mkd_ds/checkpoint/",),
    "transformers": ("m2mkd_ds/checkpoint/",),
    "huggingface_hub": ("m2mkd_ds/checkpoint/",),
    "pyarrow": ("m2mkd_ds/teacher/", "m2mkd_ds/bench/"),
    "prometheus_client": ("m2mkd_ds/teacher/",),
    "xxhash": ("m2mkd_ds/teacher/",),
    "wandb": ("m2mkd_ds/trackers/wandb_run.py",),
    "trackio": ("m2mkd_ds/trackers/trackio_run.py",),
    "accelerate": ("m2mkd_ds/checkpoint/",),
    "onnx": ("m2mkd_ds/checkpoint/onnx_export.py",),
    "onnxruntime": ("m2mkd_ds/checkpoint/onnx_export.py",),
    "onnxscript": ("m2mkd_ds/checkpoint/onnx_export.py",),
    "m2mkd_kernels": ("m2mkd_ds/moe/", "kernels/m2mkd_kernels/"),
}
ONLY_IN_FUNCTIONS = {
    "prometheus_client", "pyarrow", "xxhash", "scattermoe", "tutel", "transformers", "accelerate", "m2mkd_kernels", "onnx", "onnxruntime",
    "onnxscript", "wandb", "trackio",
}  # fmt: skip
LAZY_ROOMS = {"timm_models"}
"""What m2mkd_ds/__init__.py may import inside functions: the package's own entry points."""
HF_TEMPLATE = "m2mkd_ds/checkpoint/hf_template/"
KERNELS = "kernels/m2mkd_kernels/"


@dataclass(frozen=True)
class Import:
    """One imported module: full dotted name, line, and whether the statement runs when the file is imported."""

    module: str
    line: int
    at_module_level: bool


def imports_of(path: Path, package: str) -> Iterator[Import]:
    """Imports of a file, relative ones resolved against `package`, with `importlib.import_module("name")` counted too."""

    def visit(node: ast.AST, top: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, top)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from a.b import c`: c may be a file of its own, so the longer name is the one that is judged.
            for alias in node.names:
                yield Import(f"{stem}.{alias.name}", node.lineno, top)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno, top)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, top and not inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), True)


def judge(relative: str, package: str, found: Import) -> str | None:
    """What is wrong with one import, or None."""
    top, *rest = found.module.split(".")
    if relative.startswith(HF_TEMPLATE):
        # Travels beside exported weights: whoever loads it has torch and transformers, and not this package.
        own = found.module.startswith(package + ".")
        return None if own or top in {"torch", "transformers"} | sys.stdlib_module_names else f"an exported file imports {top}"
    if top in DOORS and not relative.startswith(DOORS[top]):
        return f"{top} is imported outside {', '.join(DOORS[top])}"
    if top in ONLY_IN_FUNCTIONS and found.at_module_level and not relative.startswith(KERNELS):
        return f"{top} is imported when the file is; it belongs inside a function"
    if top != "m2mkd_ds":
        return None
    if relative.startswith(KERNELS):
        return "kernels know nothing of m2mkd_ds"
    room = Path(relative).relative_to("m2mkd_ds").parts[0].removesuffix(".py")
    if room == "__init__":
        if rest and rest[0] in LAZY_ROOMS and not found.at_module_level:
            return None
        return f"m2mkd_ds/__init__.py imports {found.module}; importing the package must load nothing"
    if room not in MAY_IMPORT:
        return f"room {room} has no row in the table"
    if not rest or rest[0] not in MAY_IMPORT:  # a name of the package itself, such as __version__
        return None
    target = rest[0]
    doors = {entry for entry in MAY_IMPORT[room] if entry.split(".")[0] == target}
    if target == room or target in OPEN_TO_ALL or any(f"{'.'.join(rest)}.".startswith(f"{door}.") for door in doors):
        return None
    return f"{room} may not import {'.'.join(rest)}"


def violations(root: Path) -> list[str]:
    """Every forbidden import under `root`, as `file:line: what is wrong`."""
    wrong = []
    for base in ("m2mkd_ds", "kernels/m2mkd_kernels"):
        for path in sorted((root / base).rglob("*.py")):
            relative = path.relative_to(root).as_posix()
            package = ".".join(path.relative_to(root).parent.parts)
            for found in imports_of(path, package):
                message = judge(relative, package, found)
                if message:
                    wrong.append(f"{relative}:{found.line}: {message}")
    return wrong


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_package_obeys_the_import_table(repo_root: Path) -> None:
    assert violations(repo_root) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("m2mkd_ds/models/a.py", "import m2mkd_ds.train.loop", "models may not import train.loop"),
        ("m2mkd_ds/models/a.py", "from m2mkd_ds import distill", "models may not import distill"),
        ("m2mkd_ds/models/sub/a.py", "from ...distill.pairs import x", "models may not import distill.pairs.x"),
        ("m2mkd_ds/data/a.py", "def f():\n    from m2mkd_ds.models import vit", "data may not import models.vit"),
        ("m2mkd_ds/teacher/a.py", "from m2mkd_ds.checkpoint.store import x", "teacher may not import checkpoint.store.x"),
        ("m2mkd_ds/teacher/a.py", "from m2mkd_ds.checkpoint import mapping_old", "teacher may not import checkpoint.mapping_old"),
        ("m2mkd_ds/distributed/a.py", "from m2mkd_ds.models.vmoe import x", "distributed may not import models.vmoe.x"),
        ("m2mkd_ds/recipes/a.py", "from m2mkd_ds.cli import main", "recipes may not import cli.main"),
        ("m2mkd_ds/extra/a.py", "from m2mkd_ds.config import x", "room extra has no row"),
        ("m2mkd_ds/__init__.py", "from m2mkd_ds.config import x", "must load nothing"),
        ("m2mkd_ds/__init__.py", "from m2mkd_ds.timm_models import x", "must load nothing"),
        ("m2mkd_ds/__init__.py", "def f():\n    from m2mkd_ds.train import x", "must load nothing"),
        ("m2mkd_ds/checkpoint/hf/export.py", "def f():\n    import onnxruntime", "onnxruntime is imported outside"),
        ("m2mkd_ds/train/a.py", "def f():\n    import deepspeed.comm", "deepspeed is imported outside m2mkd_ds/distributed/"),
        ("m2mkd_ds/models/meta.py", "from timm.layers import x", "timm is imported outside"),
        ("m2mkd_ds/trackers/wandb_run.py", "import wandb", "inside a function"),
        ("m2mkd_ds/train/a.py", "def f():\n    import trackio", "trackio is imported outside"),
        ("m2mkd_ds/trackers/a.py", "from m2mkd_ds.data import x", "trackers may not import data"),
        ("m2mkd_ds/bench/loader.py", "def f():\n    import timm.data", "timm is imported outside"),
        ("m2mkd_ds/train/a.py", 'import importlib\nimportlib.import_module("webdataset")', "webdataset is imported outside"),
        ("m2mkd_ds/checkpoint/a.py", "import transformers", "inside a function"),
        ("m2mkd_ds/moe/a.py", "from m2mkd_kernels.grouped_gemm import naive", "inside a function"),
        ("m2mkd_ds/moe/a.py", "def f():\n    import triton", "triton is imported outside kernels/m2mkd_kernels/"),
        ("m2mkd_ds/models/a.py", "def f():\n    import m2mkd_kernels", "m2mkd_kernels is imported outside m2mkd_ds/moe/"),
        ("kernels/m2mkd_kernels/a.py", "def f():\n    import m2mkd_ds.moe", "kernels know nothing"),
        ("m2mkd_ds/checkpoint/hf_template/modeling_vmoe.py", "import timm", "an exported file imports timm"),
        ("m2mkd_ds/checkpoint/hf_template/modeling_vmoe.py", "from m2mkd_ds.models import vmoe", "an exported file imports m2mkd_ds"),
    ],
)
def test_a_forbidden_import_is_named(tmp_path: Path, file: str, text: str, expected: str) -> None:
    write_tree(tmp_path, {file: text})
    wrong = violations(tmp_path)
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{file}:{text.count(chr(10)) + 1}: ")
    assert expected in wrong[0]


def test_allowed_imports_pass(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "m2mkd_ds/__main__.py": "from m2mkd_ds.cli import main",
            "m2mkd_ds/cli.py": "from m2mkd_ds import __version__, config\ndef f():\n    from m2mkd_ds.train import loop",
            "m2mkd_ds/teacher/a.py": "from m2mkd_ds.checkpoint.mapping import x\nfrom m2mkd_ds.teacher.feed import y\nimport torch",
            "m2mkd_ds/distributed/a.py": "import deepspeed\nfrom m2mkd_ds.logs import get",
            "m2mkd_ds/moe/a.py": "def f():\n    from m2mkd_kernels.grouped_gemm import naive",
            "m2mkd_ds/checkpoint/hf_template/modeling_vmoe.py": "import math\nimport transformers\nfrom .configuration_vmoe import C",
            "kernels/m2mkd_kernels/a.py": "from m2mkd_kernels.grouped_gemm import naive\nimport triton",
        },
    )
    assert violations(tmp_path) == []
