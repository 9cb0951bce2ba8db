"""The pipeline's decisions: what runs, what is skipped, in which launches; the launcher's command. Nothing is trained here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from m2mkd_ds.config import ConfigError, LaunchConfig, RunConfig, load
from m2mkd_ds.distributed.world import World
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.launching.launch import LaunchError, launch_command, launch_environment, spell, spell_in_lines, with_own_port
from m2mkd_ds.train.nodes import Node, build_dag
from m2mkd_ds.train.pipeline import LocalRunner, describe_plan, group, plan_run, run_pipeline, write_config
from tests.train.finished_run import finish, finish_all, tiny_config


def opened(config: RunConfig) -> RunContext:
    return open_run(config, World(0, 1, 0, 1, torch.device("cpu")))


def finished(root: Path, shards: Path, *overrides: str) -> RunContext:
    ctx = opened(tiny_config(root, shards, *overrides))
    finish_all(ctx.config, root, ctx.data_fingerprints)
    return ctx


def actions(ctx: RunContext, **flags: str) -> dict[str, str]:
    return {item.node.name: item.action for item in plan_run(ctx, **flags)}


def running(ctx: RunContext, **flags: str) -> list[str]:
    return [name for name, action in actions(ctx, **flags).items() if action == "run"]


ALL = [
    "pretrain_meta", "modular_train", "assemble_finetune", "split", "m2mkd", "assemble", "end_to_end", "baseline", "evaluate", "export",
    "report",
]  # fmt: skip
BEHIND_M2MKD = ["m2mkd", "assemble", "end_to_end", "evaluate", "export", "report"]


def test_a_new_run_runs_everything_in_order(tmp_path: Path, digits_shards: Path) -> None:
    assert running(opened(tiny_config(tmp_path, digits_shards))) == ALL


def test_a_finished_run_runs_nothing(tmp_path: Path, digits_shards: Path) -> None:
    ctx = finished(tmp_path, digits_shards)
    assert set(actions(ctx).values()) == {"skip"}
    # also when the folder was moved and other engines' settings of launching and logging are asked for
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    tmp_path.rename(moved)
    assert running(opened(tiny_config(moved, digits_shards, "launch.num_gpus=1", "m2mkd.log_steps=1"))) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("m2mkd.clip_grad=0.5", BEHIND_M2MKD),
        ("m2mkd.lr=1e-4", [name for name in ALL[4:]]),
        ("m2mkd.epochs=7", [name for name in ALL[4:]]),
        ("end_to_end.lr=1e-4", ["end_to_end", "baseline", "evaluate", "export", "report"]),
        ("student.keep_stitches=true", ["assemble", "end_to_end", "evaluate", "export", "report"]),
        ("export.license=apache-2.0", ["export", "report"]),
        ("pretrain_meta.lr=1e-4", [name for name in ALL if name != "baseline"]),
        ("baseline=false", ["evaluate", "export", "report"]),
    ],
)
def test_a_change_reruns_its_node_and_what_hangs_on_it(tmp_path: Path, digits_shards: Path, override: str, expected: list[str]) -> None:
    finished(tmp_path, digits_shards)
    assert running(opened(tiny_config(tmp_path, digits_shards, override))) == expected


def test_until_and_only_leave_the_rest(tmp_path: Path, digits_shards: Path) -> None:
    ctx = opened(tiny_config(tmp_path, digits_shards))
    assert running(ctx, until="split") == ALL[:4]
    assert actions(ctx, until="split")["m2mkd"] == "leave"
    assert running(ctx, only="baseline") == ["baseline"]  # it has no inputs
    finished(tmp_path, digits_shards)
    changed = opened(tiny_config(tmp_path, digits_shards, "m2mkd.lr=1e-4"))
    assert running(changed, until="assemble") == ["m2mkd", "assemble"]
    assert running(changed, only="m2mkd") == ["m2mkd"]
    assert running(changed, only="split") == []


def test_only_needs_inputs_that_are_complete_and_up_to_date(tmp_path: Path, digits_shards: Path) -> None:
    ctx = opened(tiny_config(tmp_path, digits_shards))
    with pytest.raises(ConfigError, match=r"--only m2mkd: its input pretrain_meta is not complete \(not done yet\); run it first"):
        plan_run(ctx, only="m2mkd")
    finished(tmp_path, digits_shards)
    changed = opened(tiny_config(tmp_path, digits_shards, "m2mkd.lr=1e-4", "student.keep_stitches=true"))
    with pytest.raises(ConfigError, match=r"--only assemble: its input m2mkd is not complete \(m2mkd\.lr changed: 0\.002 -> 0\.0001\)"):
        plan_run(changed, only="assemble")
    # a missing input of some other node is no obstacle
    (tmp_path / "pretrain_meta" / "done.json").unlink()
    assert running(opened(tiny_config(tmp_path, digits_shards, "baseline=true")), only="baseline") == []


@pytest.mark.parametrize("flag", ["until", "only"])
def test_an_unknown_node_is_refused(tmp_path: Path, digits_shards: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{flag} m2mdk: no such node in this run; allowed are pretrain_meta"):
        plan_run(opened(tiny_config(tmp_path, digits_shards)), **{flag: "m2mdk"})


def test_the_plan_is_told_in_words_and_commands(tmp_path: Path, digits_shards: Path) -> None:
    finished(tmp_path, digits_shards)
    ctx = opened(tiny_config(tmp_path, digits_shards, "m2mkd.lr=1e-4", "launch.one_job=false"))
    lines = describe_plan(ctx, plan_run(ctx, until="assemble")).splitlines()
    assert lines[4] == "run   m2mkd <- pretrain_meta, split: m2mkd.lr changed: 0.002 -> 0.0001"
    assert lines[5] == "run   assemble <- m2mkd: its input m2mkd runs first"
    assert lines[3].startswith("skip  split <- assemble_finetune: complete since ")
    # left out by --until: its input runs first, so it is not complete any more
    assert lines[6] == "leave end_to_end <- assemble: its input assemble runs first"
    command = f"deepspeed --quiet --num_gpus 2 --module m2mkd_ds train --config {tmp_path}/config.yaml --phase m2mkd"
    start = lines.index("commands:")
    assert lines[start - 1] == "" and lines[-1] == "(in this process) assemble"
    assert as_shell_reads("\n".join(lines[start + 1 : -1])) == command.split()  # it may be in two lines, as the folder's name is long


def as_shell_reads(command: str) -> list[str]:
    """The words of a command."""
    asked = ["sh", "-c", command.replace("deepspeed", "printf '%s\\n' deepspeed", 1)]
    return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()


def test_a_plan_has_at_most_120_columns(tmp_path: Path, digits_shards: Path) -> None:
    finished(tmp_path, digits_shards)
    ctx = opened(tiny_config(tmp_path, digits_shards, "m2mkd.lr=1e-4"))
    rows = describe_plan(ctx, plan_run(ctx)).partition("\n\ncommands:\n")[0].splitlines()
    # In one line the last node has 121 columns: eight inputs, and which of them runs first.
    assert max(map(len, rows)) <= 120 and len(rows) == len(ALL) + 1
    inputs = "pretrain_meta, split, m2mkd, assemble, end_to_end, baseline, evaluate, export"
    assert rows[-1].startswith(" " * 10)
    assert f"{rows[-2]} {rows[-1].strip()}" == f"run   report <- {inputs}: its input m2mkd runs first"


def test_a_long_command_is_told_in_lines_that_a_shell_joins() -> None:
    phases = "pretrain_meta,modular_train,assemble_finetune,split,m2mkd,assemble,end_to_end,baseline,evaluate"
    command = launch_command(LaunchConfig(num_gpus=2), ["train", "--config", "/runs/tiny/config.yaml", "--phase", phases])
    assert spell_in_lines(command, 120) == (
        "deepspeed --quiet --num_gpus 2 --module m2mkd_ds train --config /runs/tiny/config.yaml \\\n"
        f"    --phase {phases}"
    )
    for width in (40, 80, 120):  # at 40, words are longer than a line: none is lost or cut
        assert as_shell_reads(spell_in_lines(command, width)) == spell(command).split()
    assert "\n" not in spell_in_lines(command, 200)


def test_a_dry_run_writes_nothing(tmp_path: Path, digits_shards: Path) -> None:
    run = tmp_path / "run"
    text = run_pipeline(tiny_config(run, digits_shards), {}, dry_run=True)
    assert text.startswith("run   pretrain_meta: not done yet") and not run.exists()


def named(dag: tuple[Node, ...], *names: str) -> list[Node]:
    return [node for node in dag if node.name in names]


def test_neighbours_share_a_launch_only_when_asked(tmp_path: Path, digits_shards: Path) -> None:
    dag = build_dag(tiny_config(tmp_path, digits_shards))

    def grouped(nodes: list[Node], one_job: bool) -> list[list[str]]:
        return [[node.name for node in nodes] for nodes in group(nodes, one_job=one_job)]

    assert grouped(list(dag), one_job=False) == [[name] for name in ALL]
    # export and report need this process: they end the job
    assert grouped(list(dag), one_job=True) == [ALL[:9], ["export"], ["report"]]
    assert grouped(named(dag, "m2mkd", "evaluate", "export"), one_job=True) == [["m2mkd", "evaluate"], ["export"]]
    assert grouped([], one_job=True) == []


def recorder(calls: list[str], contents: Mapping[str, str]) -> dict[str, LocalRunner]:
    """Runners of export and report that finish the node with the given content; without content they leave nothing."""

    def runner(name: str) -> LocalRunner:
        def run(ctx: RunContext) -> None:
            calls.append(name)
            if name in contents:
                finish(ctx.config, ctx.root, name, ctx.data_fingerprints, content=contents[name])

        return run

    return {name: runner(name) for name in ("export", "report")}


def test_an_input_that_comes_out_with_the_same_bytes_stops_the_rerun(tmp_path: Path, digits_shards: Path) -> None:
    ctx = finished(tmp_path, digits_shards)
    (tmp_path / "export" / "done.json").unlink()
    assert running(ctx) == ["export", "report"]  # before export has run, nobody knows
    calls: list[str] = []
    run_pipeline(ctx.config, recorder(calls, {"export": "export", "report": "report"}))
    assert calls == ["export"]
    (tmp_path / "export" / "done.json").unlink()
    calls.clear()
    run_pipeline(ctx.config, recorder(calls, {"export": "other bytes", "report": "report"}))
    assert calls == ["export", "report"]
    calls.clear()
    run_pipeline(ctx.config, recorder(calls, {}))
    assert calls == []
    assert load(tmp_path / "config.yaml") == ctx.config


def test_a_node_that_leaves_no_result_is_an_error(tmp_path: Path, digits_shards: Path) -> None:
    ctx = finished(tmp_path, digits_shards)
    (tmp_path / "export" / "done.json").unlink()
    with pytest.raises(LaunchError, match=r"export ended without its result in .*export \(not done yet\)"):
        run_pipeline(ctx.config, recorder([], {}))
    finish(ctx.config, tmp_path, "export", ctx.data_fingerprints)
    # the result of an earlier configuration is none
    with pytest.raises(LaunchError, match=r"export ended without its result .*export\.license changed: mit -> apache-2\.0"):
        run_pipeline(tiny_config(tmp_path, digits_shards, "export.license=apache-2.0"), recorder([], {}))


def test_the_launcher_gets_plain_words() -> None:
    launch = LaunchConfig(num_gpus=4, hostfile="/etc/hosts.txt", extra=("--include", "host@host-2:0,1"))
    command = launch_command(launch, ["train", "--config", "/a/config.yaml", "--phase", "split,m2mkd"])
    assert command[0] == sys.executable
    assert spell(command) == (
        "deepspeed --quiet --num_gpus 4 --hostfile /etc/hosts.txt --include host@host-2:0,1 "
        "--module m2mkd_ds train --config /a/config.yaml --phase split,m2mkd"
    )
    assert "--num_gpus" not in launch_command(LaunchConfig(), ["train"])  # all GPUs of the host: the launcher's own choice


def test_runs_on_one_host_get_ports_of_their_own() -> None:
    first, second = (with_own_port(LaunchConfig(extra=("--bind_cores_to_rank",))).extra for _ in range(2))
    assert first[0] == "--master_port" and 1024 < int(first[1]) < 65536 and first[2:] == ("--bind_cores_to_rank",)
    assert first[1] != second[1]
    for settled in (LaunchConfig(hostfile="/hosts"), LaunchConfig(extra=("--master_port", "29501"))):
        assert with_own_port(settled) == settled


@pytest.mark.parametrize(
    "word", ["/my runs/config.yaml", "a;b", "$HOME/x", "a'b", 'a"b', "a&b", "a|b", "a*", "a\nb", "läuft", "~/x", "(x)"]
)
def test_a_word_that_a_remote_shell_would_change_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="has a character that a remote shell would change; rename"):
        launch_command(LaunchConfig(num_gpus=1), ["train", "--config", word])
    with pytest.raises(ConfigError, match="has a character that a remote shell would change"):
        launch_command(LaunchConfig(num_gpus=1, extra=(word,)), ["train"])


def test_a_run_folder_with_such_a_name_is_refused_before_anything_runs(tmp_path: Path, digits_shards: Path) -> None:
    run = tmp_path / "my run"
    with pytest.raises(ConfigError, match=r"my run/config\.yaml' has a character"):
        run_pipeline(tiny_config(run, digits_shards), {})
    assert not run.exists()


def test_ranks_find_this_checkout_and_keep_what_the_user_set(repo_root: Path) -> None:
    environment = launch_environment(LaunchConfig(threads_per_rank=3), {"PYTHONPATH": "/mine", "HOME": "/h"})
    assert environment["PYTHONPATH"] == f"{repo_root}:{repo_root / 'kernels'}:/mine"
    assert environment["OMP_NUM_THREADS"] == "3" and environment["HOME"] == "/h"
    assert launch_environment(LaunchConfig(threads_per_rank=3), {"OMP_NUM_THREADS": "8"})["OMP_NUM_THREADS"] == "8"


def test_the_written_config_is_read_back_and_replaces_the_old_one(tmp_path: Path, digits_shards: Path) -> None:
    config = tiny_config(tmp_path / "run", digits_shards)
    file = write_config(config)
    assert file == (tmp_path / "run" / "config.yaml").resolve() and load(file) == config
    write_config(tiny_config(tmp_path / "run", digits_shards, "seed=5"))
    assert load(file).seed == 5 and [item.name for item in file.parent.iterdir()] == ["config.yaml"]
