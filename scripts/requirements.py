"""Print the requirements that setup.py declares, one a line, without running setup.py (setuptools may be absent).

    python3 scripts/requirements.py [LIST ...]        LIST: INSTALL_REQUIRES DEV_REQUIRES (default: both)
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

SETUP = Path(__file__).resolve().parent.parent / "setup.py"


def requirements(names: list[str]) -> list[str]:
    """The strings of the named list literals, in order. Raises ValueError for a list that setup.py does not have."""
    found = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(SETUP.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{SETUP.name} has no list {', '.join(missing)}; it has {', '.join(found)}")
    return [line for name in names for line in found[name]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:] or ["INSTALL_REQUIRES", "DEV_REQUIRES"])))
