#!/usr/bin/env bash
# Lint, types and tests of this checkout, on a machine that has only Python: installs what it needs once (scripts/venv.sh).
#
#   scripts/test.sh                     ruff, mypy, and every test but the slow and the multi-node ones
#   scripts/test.sh --all               those too
#   scripts/test.sh tests/moe -k router further words go to pytest
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A lab of hosts needs a few Debian packages; where they cannot be had, its tests are skipped and say so.
lab_is_possible() { for name in pdsh sshd ip hostname; do command -v "$name" >/dev/null || return 1; done; }
if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! lab_is_possible; then
    echo "== packages for the lab of hosts =="
    export DEBIAN_FRONTEND=noninteractive
    { timeout 120 apt-get update -qq && timeout 240 apt-get install -y -qq --no-install-recommends iproute2 openssh-server pdsh hostname; } \
        >/dev/null 2>&1 || echo "not installed; the tests of tests/cluster will be skipped"
fi
python=$(scripts/venv.sh)
export PATH="${python%/*}:$PATH" PYTHONPATH="$PWD:$PWD/kernels" PYTHONNOUSERSITE=1
unset PYTHONDONTWRITEBYTECODE  # some hundreds of processes import this checkout: compiled once, each starts half a second sooner

echo "== ruff =="
"$python" -m ruff check .
echo "== mypy =="
"$python" -m mypy
echo "== pytest =="
exec "$python" -m pytest "$@"
