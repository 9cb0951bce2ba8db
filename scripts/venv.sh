#!/usr/bin/env bash
# Make, once, a virtual environment with everything setup.py asks for, and print the path of its python.
#
#   python=$(scripts/venv.sh)
#
# It lies outside the checkout, under ${M2MKD_CACHE:-${XDG_CACHE_HOME:-~/.cache}/m2mkd_ds}, and its name is a hash of the
# requirements and of the Python version: checkouts with equal requirements share it, a changed requirement makes a new one.
# The package itself is not installed into it; callers run from the checkout by PYTHONPATH, so no checkout can pick up
# another one's code. PYTHON names the interpreter to start from (default: python3).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
base_python=${PYTHON:-python3}
home=~  # also right where HOME is not set
cache=${M2MKD_CACHE:-${XDG_CACHE_HOME:-$home/.cache}/m2mkd_ds}
say() { printf '%s\n' "$*" >&2; }

command -v "$base_python" >/dev/null || { say "venv.sh: no $base_python here; install Python 3.10 or newer, or name one with PYTHON=..."; exit 1; }
tag=$("$base_python" -c 'import platform, sys; print("py%d%d-%s" % (*sys.version_info[:2], platform.machine()))')
"$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || { say "venv.sh: $base_python is $tag; Python 3.10 or newer is needed, name one with PYTHON=..."; exit 1; }

requirements=$("$base_python" "$root/scripts/requirements.py")
key=$(printf '%s\n%s\n' "$tag" "$requirements" | "$base_python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:12])')
venv=$cache/venv-$tag-$key
python=$venv/bin/python
marker=$venv/installed.txt  # written last and by rename: an environment without it was interrupted

ready() { [ -f "$marker" ] && "$python" -c '' 2>/dev/null; }

if ! ready; then
    mkdir -p "$cache"
    exec 9>"$venv.lock"
    if command -v flock >/dev/null; then
        flock --nonblock 9 || { say "venv.sh: another process is installing into $venv; waiting for it"; flock 9; }
    fi
    if ! ready; then
        if [ -e "$venv" ]; then
            say "venv.sh: $venv was left unfinished; starting it again"
            rm -rf "$venv"
        fi
        say "venv.sh: installing into $venv (about 6 GB and 2-5 minutes, once)"
        # 9>&-: a background process of pip must not keep the lock.
        "$base_python" -m venv "$venv" >&2 9>&- || {
            rm -rf "$venv"
            say "venv.sh: $base_python -m venv failed; on Debian and Ubuntu install the package python3-venv"
            exit 1
        }
        printf '%s\n' "$requirements" > "$venv/requirements.txt"
        quiet=--quiet
        [ -t 2 ] && quiet=--progress-bar=on  # a terminal gets pip's bars, a log file no thousand lines
        "$python" -m pip install --disable-pip-version-check "$quiet" -r "$venv/requirements.txt" >&2 9>&-
        "$python" -m pip check --disable-pip-version-check >&2 9>&-
        "$python" -m pip freeze --disable-pip-version-check > "$marker.part" 9>&-
        mv "$marker.part" "$marker"
        for other in "$cache"/venv-*/; do
            [ "${other%/}" = "$venv" ] || say "venv.sh: an environment of other requirements is in ${other%/}; delete it if no checkout needs it"
        done
    fi
fi
printf '%s\n' "$python"
