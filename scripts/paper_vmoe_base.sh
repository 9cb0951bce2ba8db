#!/usr/bin/env bash
# The paper's V-MoE-Base on a cluster: every phase of recipe vmoe_base_in1k, one `deepspeed` line each, over ssh (pdsh).
#
#   scripts/paper_vmoe_base.sh [--dry-run] [--any-batch] HOSTFILE RUN_DIR SHARDS [KEY=VALUE ...]
#
# HOSTFILE  lines `name slots=GPUS` (scripts/hostfile.example); every node must reach the first one by its name.
# RUN_DIR   receives config, weights, metrics, report. On a file system that every node sees, under a path without blanks.
# SHARDS    holds train/ and validation/ (scripts/make_imagenet_shards.sh); every node must see it, too.
# KEY=VALUE overrides fields of the recipe, for example export.license=cc-by-4.0 baseline=false.
# --dry-run prints the commands and starts nothing. --any-batch lets global batches differ from the paper's (2048 and 1024).
#
# Run it again after any stop: finished phases say so and return, an unfinished one goes on from its last checkpoint.
# The checkout and the Python environment must lie under the same path on every node. M2MKD_PYTHON names the python of an
# environment of your own (with deepspeed beside it); else scripts/venv.sh makes one. MASTER_ADDR and MASTER_PORT override the
# first host's name and 29500, OMP_NUM_THREADS the threads of a rank (1). DeepSpeed's launcher ends a job by killing everything
# on the nodes that was started with the same python: run one job a user and environment at a time.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
fail() { printf 'paper_vmoe_base.sh: %s\n' "$*" >&2; exit 2; }

dry_run=false
config_flags=()
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=true ;;
        --any-batch) config_flags+=(--any-batch) ;;
        *) fail "$1: no such flag; see --help" ;;
    esac
    shift
done
[ $# -ge 3 ] || fail "expected HOSTFILE RUN_DIR SHARDS; see --help"
hostfile=$(realpath -m -- "$1") run_dir=$(realpath -m -- "$2") shards=$(realpath -m -- "$3")
shift 3
[ -f "$hostfile" ] || fail "$hostfile: no such hostfile; scripts/hostfile.example shows one"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -r first_host hosts ranks < <(awk '/^[ \t]*(#|$)/ {next}
    match($2, /^slots=[0-9]+$/) {if (!n++) first = $1; sum += substr($2, 7); next} {bad = 1}
    END {if (!bad && n) print first, n, sum; else print "- 0 0"}' "$hostfile")
[ "$hosts" -gt 0 ] || fail "$hostfile: expected lines such as \`node1 slots=8\`; see scripts/hostfile.example"
master=${MASTER_ADDR:-$first_host}
# The launcher hands its arguments to a shell on each node without quotes, and changes to the folder it was started in.
for word in "$root" "$hostfile" "$run_dir" "$master"; do
    [[ $word =~ ^[A-Za-z0-9_./:,@+-]+$ ]] || fail "$word: has a character that a remote shell would change; rename it"
done

# A node whose link is down ends the job within half a minute; without this, ssh and with it `deepspeed` would hang.
PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=5 -o ServerAliveCountMax=2 ${PDSH_SSH_ARGS_APPEND:-}"
# What ranks on other nodes are told; the launcher itself carries PYTHON* and NCCL* only. One NAME=VALUE a line, no comments.
DS_ENV_FILE=${DS_ENV_FILE:-$run_dir/launch.env}
export PDSH_SSH_ARGS_APPEND DS_ENV_FILE OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

config=$run_dir/config.yaml
# --force_multi: with one host in the file, the launcher would start the ranks here, whatever the host's name.
launcher=(deepspeed --hostfile "$hostfile" --master_addr "$master" --master_port "${MASTER_PORT:-29500}" --force_multi --quiet)
# Each line names a node of the run; those of one process run here.
nodes=(pretrain_meta modular_train assemble_finetune split m2mkd assemble end_to_end baseline evaluate export report)
case " $* " in *' baseline=false '*) nodes=("${nodes[@]/baseline/}") ;; esac

# Sets `words`, the command of a node.
command_of() {
    case $1 in
        split | assemble | export | report) words=(m2mkd pipeline --config "$config" --only "$1") ;;
        *) words=("${launcher[@]}" --module m2mkd_ds train --config "$config" --phase "$1") ;;
    esac
}

if $dry_run; then
    printf 'export PDSH_SSH_ARGS_APPEND=%q DS_ENV_FILE=%q\n' "$PDSH_SSH_ARGS_APPEND" "$DS_ENV_FILE"
    printf '%q ' python scripts/paper_config.py ${config_flags[@]+"${config_flags[@]}"} "$run_dir" "$shards" "$ranks" "$@"
    printf '\n'
    for node in "${nodes[@]}"; do
        [ -n "$node" ] || continue
        command_of "$node"
        printf '%s\n' "${words[*]}"
    done
    exit 0
fi

python=${M2MKD_PYTHON:-$("$root/scripts/venv.sh")}
[[ $python =~ ^/[A-Za-z0-9_./+-]+$ ]] || fail "$python: the python must be an absolute path of plain characters"
export PATH="${python%/*}:$PATH" PYTHONPATH="$root:$root/kernels" PYTHONNOUSERSITE=1
m2mkd() { "$python" -m m2mkd_ds "$@"; }
command -v deepspeed >/dev/null || fail "no deepspeed beside $python; install the requirements of setup.py there"
cd "$root"
mkdir -p "$run_dir"
"$python" scripts/paper_config.py ${config_flags[@]+"${config_flags[@]}"} "$run_dir" "$shards" "$ranks" "$@"
if [ "$DS_ENV_FILE" = "$run_dir/launch.env" ]; then
    for name in PATH OMP_NUM_THREADS LD_LIBRARY_PATH CUDA_HOME DS_ACCELERATOR GLOO_SOCKET_IFNAME HF_HOME HF_HUB_OFFLINE \
        TORCH_EXTENSIONS_DIR; do
        [ -z "${!name:-}" ] || printf '%s=%s\n' "$name" "${!name}"
    done > "$DS_ENV_FILE"
fi
for node in "${nodes[@]}"; do
    [ -n "$node" ] || continue
    command_of "$node"
    printf '+ %s\n' "${words[*]}"
    "${words[@]}"
    # An exit code of 0 is no proof: the launcher also gives it when a signal ended it.
    [ -f "$run_dir/$node/done.json" ] || { printf '%s left no %s\n' "$node" "$run_dir/$node/done.json" >&2; exit 1; }
done
