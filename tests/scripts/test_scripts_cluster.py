"""Scripts for a cluster: the commands they give, read by DeepSpeed's own launcher, and what they do when a phase leaves nothing.

Launcher, package, srun and scontrol are played by one shell script that writes each call down.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHED = ["pretrain_meta", "modular_train", "assemble_finetune", "m2mkd", "end_to_end", "baseline", "evaluate"]
IN_ORDER = [
    "pretrain_meta", "modular_train", "assemble_finetune", "split", "m2mkd", "assemble", "end_to_end", "baseline", "evaluate",
    "export", "report",
]  # fmt: skip

STAND_IN = """#!/usr/bin/env bash
# python, deepspeed, srun and scontrol in one. A call of a phase or a node leaves RUN/<node>/done.json unless it is named in LAZY.
finish() { [ "$1" = "$LAZY" ] || { mkdir -p "$RUN/$1"; touch "$RUN/$1/done.json"; }; }
case "${0##*/} $1" in
    "python -m") echo "m2mkd ${*:3}" >> "$LOG"; finish "${!#}" ;;
    "python "*) exec "$REAL_PYTHON" "$@" ;;
    deepspeed*)
        echo "deepspeed $*" >> "$LOG"
        env | grep -E '^(PDSH_SSH_ARGS_APPEND|DS_ENV_FILE|PYTHONPATH)=' >> "$LOG.env"
        for node in $(echo "${!#}" | tr , ' '); do finish "$node"; done ;;
    srun*)
        echo "srun $*" >> "$LOG"
        for node in $(echo "${!#}" | tr , ' '); do [ "$node" != "$STOPPED" ] || exit 75; finish "$node"; done ;;
    scontrol*) echo "scontrol $*" >> "$LOG" ;;
esac
"""


class Cluster:
    """A folder with stand-ins on the PATH, a hostfile of two nodes of four ranks, and a log of calls."""

    def __init__(self, folder: Path, repo_root: Path) -> None:
        self.folder, self.root = folder, repo_root
        self.run_dir, self.log, self.hostfile = folder / "run", folder / "log", folder / "hosts"
        self.hostfile.write_text("# two nodes\nnodeB slots=4\n\nnodeA slots=4\n")
        (folder / "bin").mkdir()
        for name in ("python", "deepspeed", "srun", "scontrol"):
            (folder / "bin" / name).write_text(STAND_IN)
            (folder / "bin" / name).chmod(0o755)

    def start(self, script: str, *words: str, lazy: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run scripts/<script>; the log starts empty."""
        self.log.write_text("")
        own = {
            "M2MKD_PYTHON": str(self.folder / "bin/python"), "REAL_PYTHON": sys.executable, "LOG": str(self.log), "RUN": str(self.run_dir),
            "LAZY": lazy, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        command = ["bash", str(self.root / "scripts" / script), *words]
        return subprocess.run(command, env={**os.environ, **own, **environment}, cwd=self.root, capture_output=True, text=True, timeout=120)

    def paper(self, *words: str, lazy: str = "", flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """paper_vmoe_base.sh on this cluster's hosts, run folder and shards."""
        places = str(self.hostfile), str(self.run_dir), str(self.folder / "shards")
        return self.start("paper_vmoe_base.sh", *flags, *places, *words, lazy=lazy)

    def calls(self) -> list[str]:
        """Commands in the order in which they were given."""
        return self.log.read_text().splitlines()


def node_of(line: str) -> str:
    """The node that a command runs: its last word."""
    return line.split()[-1]


@pytest.fixture
def cluster(tmp_path: Path, repo_root: Path) -> Cluster:
    return Cluster(tmp_path, repo_root)


@pytest.mark.parametrize("name", ["paper_vmoe_base.sh", "slurm.sbatch", "make_imagenet_shards.sh"])
def test_a_script_parses_and_explains_itself(name: str, repo_root: Path) -> None:
    path = str(repo_root / "scripts" / name)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    shown = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, check=True).stdout
    assert f"scripts/{name}" in shown
    assert "#" not in shown  # neither code nor #SBATCH lines slip into it


def test_the_dry_run_names_every_node_once_in_order_and_starts_nothing(cluster: Cluster) -> None:
    done = cluster.paper(flags=("--dry-run",))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("export PDSH_SSH_ARGS_APPEND=") and "ServerAliveInterval=5" in lines[0]
    assert shlex.split(lines[1]) == ["python", "scripts/paper_config.py", str(cluster.run_dir), str(cluster.folder / "shards"), "8"]
    commands = lines[2:]
    assert [node_of(line) for line in commands] == IN_ORDER
    assert [node_of(line) for line in commands if line.startswith("deepspeed ")] == LAUNCHED
    assert cluster.calls() == [] and not cluster.run_dir.exists()


def test_deepspeed_s_own_parser_reads_the_commands(cluster: Cluster, repo_root: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    lines = [line for line in cluster.paper(flags=("--dry-run",)).stdout.splitlines() if line.startswith("deepspeed ")]
    for line, phase in zip(lines, LAUNCHED, strict=True):
        args = parse_args(shlex.split(line)[1:])
        # The launcher joins these words for a shell on each node: they must read back as they are.
        assert shlex.split(" ".join(args.user_args)) == args.user_args
        assert (args.user_script, args.module, args.force_multi, args.no_ssh) == ("m2mkd_ds", True, True, False)
        assert args.user_args == ["train", "--config", f"{cluster.run_dir}/config.yaml", "--phase", phase]
        assert (args.hostfile, args.master_addr, args.master_port) == (str(cluster.hostfile), "nodeB", 29500)
    assert dict(fetch_hostfile(str(repo_root / "scripts/hostfile.example"))) == {"node1": 8, "node2": 8}


def test_a_run_gives_the_commands_of_the_dry_run_and_starts_again_where_it_stopped(cluster: Cluster) -> None:
    planned = cluster.paper(flags=("--dry-run",)).stdout.splitlines()[2:]
    stopped = cluster.paper(lazy="m2mkd")
    assert stopped.returncode == 1
    assert "m2mkd left no" in stopped.stderr
    assert cluster.calls() == planned[:5]  # nothing is built on a phase that left nothing
    assert cluster.paper().returncode == 0
    assert cluster.calls() == planned
    sent = dict(line.split("=", 1) for line in (cluster.run_dir / "launch.env").read_text().splitlines())
    assert sent["PATH"].startswith(str(cluster.folder / "bin")) and sent["OMP_NUM_THREADS"] == "1"
    environment = Path(f"{cluster.log}.env").read_text()
    assert "PDSH_SSH_ARGS_APPEND=-o ServerAliveInterval=5 -o ServerAliveCountMax=2" in environment
    assert f"DS_ENV_FILE={cluster.run_dir}/launch.env" in environment
    assert f"PYTHONPATH={cluster.root}:{cluster.root}/kernels" in environment


def test_the_config_holds_the_paths_and_cannot_change_under_a_run(cluster: Cluster) -> None:
    from m2mkd_ds.config import load

    assert cluster.paper("baseline=false").returncode == 0
    assert [node_of(call) for call in cluster.calls()] == [node for node in IN_ORDER if node != "baseline"]
    config = load(cluster.run_dir / "config.yaml")
    assert config.data.train == str(cluster.folder / "shards/train")
    assert (config.run_dir, config.baseline) == (str(cluster.run_dir), False)
    other = cluster.paper("baseline=false", "m2mkd.lr=1e-3")
    assert other.returncode != 0
    assert "m2mkd.lr: 0.0005 -> 0.001" in other.stderr
    assert cluster.calls() == []


def test_other_numbers_of_ranks_keep_the_paper_s_batches_or_are_refused(cluster: Cluster) -> None:
    cluster.hostfile.write_text("nodeA slots=8\nnodeB slots=8\n")
    refused = cluster.paper()
    assert refused.returncode != 0
    # By hand, for 16 ranks: 2048 / 16 = 128 images a rank, 1024 / 16 = 64.
    wanted = [
        "pretrain_meta.micro_batch_size=128", "pretrain_meta.gradient_accumulation_steps=1",
        "modular_train.micro_batch_size=128", "modular_train.gradient_accumulation_steps=1",
        "assemble_finetune.micro_batch_size=64", "assemble_finetune.gradient_accumulation_steps=1",
        "m2mkd.micro_batch_size=128", "m2mkd.gradient_accumulation_steps=1",
        "end_to_end.micro_batch_size=64", "end_to_end.gradient_accumulation_steps=1",
    ]  # fmt: skip
    assert f"append {' '.join(wanted)}," in refused.stderr
    assert not (cluster.run_dir / "config.yaml").exists()
    assert cluster.paper(*wanted).returncode == 0
    cluster.hostfile.write_text("nodeA slots=3\n")
    assert "3 ranks do not divide" in cluster.paper().stderr
    (cluster.run_dir / "config.yaml").unlink()
    assert cluster.paper(flags=("--any-batch",)).returncode == 0


@pytest.mark.parametrize(
    ("hosts", "words", "message"),
    [
        ("node1 slots=8\n", ["ho$t", "run", "shards"], "no such hostfile"),
        ("node1\n", [], "expected lines such as"),
        ("# nothing\n", [], "expected lines such as"),
        ("node;reboot slots=8\n", [], "a remote shell would change"),
    ],
)
def test_what_the_launcher_would_take_wrongly_is_refused(cluster: Cluster, hosts: str, words: list[str], message: str) -> None:
    cluster.hostfile.write_text(hosts)
    done = cluster.start("paper_vmoe_base.sh", *words) if words else cluster.paper()
    assert done.returncode == 2
    assert message in done.stderr
    assert cluster.calls() == []


SLURM = {"SLURM_JOB_ID": "40017", "SLURM_JOB_NODELIST": "n[2,1]", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "6"}


@pytest.fixture
def queued(cluster: Cluster) -> Cluster:
    """The cluster with a run folder that has a config."""
    cluster.run_dir.mkdir()
    (cluster.run_dir / "config.yaml").touch()
    return cluster


def test_under_slurm_srun_starts_every_rank(queued: Cluster) -> None:
    job = {**SLURM, "SLURM_SUBMIT_DIR": str(queued.root)}
    done = queued.start("slurm.sbatch", str(queued.run_dir), "pretrain_meta", "m2mkd,assemble", **job)
    assert done.returncode == 0, done.stderr
    start = f"srun --ntasks-per-node=8 --kill-on-bad-exit=1 --cpus-per-task=6 {queued.folder}/bin/python -m m2mkd_ds train"
    assert queued.calls() == [
        f"{start} --config {queued.run_dir}/config.yaml --phase {phase}" for phase in ("pretrain_meta", "m2mkd,assemble")
    ]  # fmt: skip


def test_under_slurm_the_default_is_the_whole_run_and_a_lazy_phase_stops_it(queued: Cluster) -> None:
    job = {**SLURM, "SLURM_SUBMIT_DIR": str(queued.root)}
    assert queued.start("slurm.sbatch", str(queued.run_dir), **job).returncode == 0
    assert ",".join(node_of(call) for call in queued.calls()).split(",") == IN_ORDER
    for file in queued.run_dir.glob("*/done.json"):
        file.unlink()
    stopped = queued.start("slurm.sbatch", str(queued.run_dir), lazy="split", **job)
    assert stopped.returncode == 1
    assert "split left no" in stopped.stderr
    assert node_of(queued.calls()[-1]) == "assemble_finetune,split"


def test_under_slurm_a_run_that_was_stopped_on_request_is_queued_again(queued: Cluster) -> None:
    job = {**SLURM, "SLURM_SUBMIT_DIR": str(queued.root), "STOPPED": "modular_train"}
    stopped = queued.start("slurm.sbatch", str(queued.run_dir), **job)
    assert stopped.returncode == 0, stopped.stderr
    assert [node_of(call) for call in queued.calls()] == ["pretrain_meta", "modular_train", "40017"]
    assert queued.calls()[-1] == "scontrol requeue 40017"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"SLURM_NTASKS_PER_NODE": ""}, "give sbatch --ntasks-per-node=RANKS"), ({"SLURM_JOB_NODELIST": ""}, "start this file by sbatch")],
)
def test_a_slurm_job_without_ranks_is_refused(queued: Cluster, change: dict[str, str], message: str) -> None:
    done = queued.start("slurm.sbatch", str(queued.run_dir), **{**SLURM, "SLURM_SUBMIT_DIR": str(queued.root), **change})
    assert (done.returncode, queued.calls()) == (2, [])
    assert message in done.stderr


def test_the_example_of_an_environment_file_is_one(repo_root: Path) -> None:
    from m2mkd_ds.train.launching.launch_env import read_env_file

    assert read_env_file(repo_root / "scripts/deepspeed_env.example").keys() == {"HF_HOME", "TORCH_EXTENSIONS_DIR", "NCCL_DEBUG"}


def test_imagenet_s_folders_are_looked_at_before_anything_is_written(tmp_path: Path, repo_root: Path) -> None:
    script = ["bash", str(repo_root / "scripts/make_imagenet_shards.sh"), str(tmp_path / "in"), str(tmp_path / "out")]
    for part, names in (("train", ("cat", "dog")), ("val", ("cat",))):
        for name in names:
            (tmp_path / "in" / part / name).mkdir(parents=True)
    for classes, message in (("1000", "train: holds 2 class folders, expected 1000"), ("2", "val: holds 1 class folders, expected 2")):
        done = subprocess.run(script, env={**os.environ, "NUM_CLASSES": classes}, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "out").exists()
