#!/usr/bin/env bash
# The whole method on real images, on two CPU ranks, from an empty machine: install, shards, every phase, export, report.
#
#   scripts/quickstart.sh [RUN_DIR] [--set KEY=VALUE ...]
#
# RUN_DIR (default: runs/quickstart) receives everything but the environment: shards, weights, metrics, the exported model,
# the report. Stopped half-way, the same command goes on; finished, it says so at once. KEY=VALUE override fields of the
# recipe `fashion`. With a GPU: DS_ACCELERATOR=cuda scripts/quickstart.sh RUN_DIR --set launch.num_gpus=1
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run_dir=runs/quickstart
case "${1:-}" in '' | -* | *=*) ;; *) run_dir=$1; shift ;; esac
overrides=()
for word in "$@"; do
    case $word in
        --set) ;;
        *=*) overrides+=("$word") ;;
        *) echo "quickstart.sh: $word: expected KEY=VALUE; see --help" >&2; exit 2 ;;
    esac
done
mkdir -p "$run_dir"
run_dir=$(cd "$run_dir" && pwd)
data=$run_dir/data

python=$("$root/scripts/venv.sh")
export PATH="${python%/*}:$PATH" PYTHONPATH="$root:$root/kernels" PYTHONNOUSERSITE=1
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
m2mkd() { "$python" -m m2mkd_ds "$@"; }
step() { printf '\n== %s ==\n' "$*"; }
started=$SECONDS

step "images -> webdataset shards"
# An index.json is written last, so its presence means complete shards; a run does not change its data half-way.
complete() { [ -f "$1/train/index.json" ] && [ -f "$1/validation/index.json" ]; }
shards=$data/fashion_mnist
if complete "$shards"; then
    echo "$shards is complete"
elif [ -d "$data/digits" ] || ! m2mkd shards write --source fashion_mnist --out "$shards"; then
    echo "!! No Fashion-MNIST (a start without it said why). Going on with scikit-learn's 1,797 DIGITS of 8x8 pixels:" >&2
    echo "!! the chain runs all the same, but its accuracies are those of another and easier data set." >&2
    shards=$data/digits
    complete "$shards" || m2mkd shards write --source digits --out "$shards"
fi

step "teacher -> modules -> m2mKD -> V-MoE -> export -> report"
m2mkd pipeline --recipe fashion --run-dir "$run_dir" \
    --set "data.train=$shards/train" "data.validation=$shards/validation" "data.source=${shards##*/}" ${overrides[@]+"${overrides[@]}"}

step "the exported folder, loaded by transformers alone"
# An empty PYTHONPATH: whoever gets this folder does not have our package either.
PYTHONPATH='' HF_HUB_OFFLINE=1 "$python" "$root/scripts/classify.py" "$run_dir/export/model" "$shards/validation"

step "result after $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
m2mkd report "$run_dir"
