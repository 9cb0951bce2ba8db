#!/usr/bin/env bash
# Lint, types and tests of this checkout, on a machine that has only Python: installs what it needs once (scripts/venv.sh).
#
#   scripts/test.sh                     ruff, mypy, and every test but the slow and the multi-node ones
#   scripts/test.sh --all               those too
#   scripts/test.sh tests/moe -k router further words go to pytest
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(scripts/venv.sh)
export PATH="${python%/*}:$PATH" PYTHONPATH="$PWD:$PWD/kernels" PYTHONNOUSERSITE=1

echo "== ruff =="
"$python" -m ruff check .
echo "== mypy =="
"$python" -m mypy
echo "== pytest =="
exec "$python" -m pytest "$@"
