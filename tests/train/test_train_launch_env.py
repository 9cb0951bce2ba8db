"""What ranks on other hosts are told, and what is never sent."""

from __future__ import annotations

import os
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from m2mkd_ds.config import ConfigError
from m2mkd_ds.train.launching.launch import cluster_environment
from m2mkd_ds.train.launching.launch_env import is_secret, read_env_file, sent_environment

HERE = {
    "HOME": "/nowhere", "PATH": "/env/bin:/usr/bin", "OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": "/x",
    "HF_HOME": "/hf", "HF_TOKEN": "hf_abc", "WANDB_API_KEY": "123", "WANDB_MODE": "offline", "AWS_REGION": "eu", "EDITOR": "vi",
    "PYTHONPATH": "/a:/b", "MLFLOW_TRACKING_TOKEN": "t", "NCCL_DEBUG": "INFO",
}  # fmt: skip


def test_what_the_launcher_does_not_carry_is_sent_and_secrets_stay() -> None:
    values, secrets = sent_environment(HERE)
    assert values == {
        "PATH": "/env/bin:/usr/bin", "OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": "/x", "HF_HOME": "/hf",
        "WANDB_MODE": "offline", "NCCL_DEBUG": "INFO",
    }  # fmt: skip
    assert secrets == ["AWS_REGION", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"]


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True), ("HUGGING_FACE_HUB_TOKEN", True), ("WANDB_API_KEY", True), ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_SESSION_TOKEN", True), ("MLFLOW_TRACKING_PASSWORD", True), ("HF_TOKEN_PATH", False), ("HF_HOME", False), ("PATH", False),
    ],
)  # fmt: skip
def test_secrets_are_told_by_their_names(name: str, secret: bool) -> None:
    assert is_secret(name) == secret


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=1\n# note\n", "line 2: '# note'; expected NAME=VALUE, no comment and no empty line"),
        ("A=1\n\nB=2\n", "line 2: ''"),
        ("export A=1\n", "line 1"),
        ("HF_TOKEN=hf_1\n", "line 1: HF_TOKEN would stand on a command line that every user"),
    ],
)
def test_a_file_that_the_launcher_would_choke_on_or_print_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "env").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_env_file(tmp_path / "env")


@pytest.mark.parametrize("value", ["$HOME/x", "`date`", 'a"b', "a\\b", "%h", "a!b"])
@pytest.mark.parametrize("name", ["HF_HOME", "PYTHONPATH"])
def test_a_value_that_a_shell_would_change_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* would change"):
        sent_environment({name: value})


def test_the_user_s_file_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("OMP_NUM_THREADS=7\nMY_FLAG=a b=c\n")
    values, _ = sent_environment({"OMP_NUM_THREADS": "1", "DS_ENV_FILE": str(tmp_path / "env")})
    assert values == {"OMP_NUM_THREADS": "7", "MY_FLAG": "a b=c"}


def test_the_file_of_a_run_is_read_back_by_the_launcher_and_by_a_shell(tmp_path: Path) -> None:
    """DeepSpeed's own code puts the values on its command line; a shell must find them there as they were."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    environment = {"PATH": os.environ["PATH"], "HF_HOME": "/my folder/it's (here); x", "M2MKD_DEBUG": "a=b"}
    told = cluster_environment(environment, tmp_path / "launch.env")
    runner = PDSHRunner(Namespace(user_args=[], user_script="x", launcher_args=""), "")
    for line in Path(told["DS_ENV_FILE"]).read_text().splitlines():
        runner.add_export(*line.split("=", 1))
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    seen = subprocess.run(["sh", "-c", f"{exports} env"], env={}, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {f"{name}={value}" for name, value in environment.items()} <= set(seen)


def test_links_are_watched_behind_what_the_user_set(tmp_path: Path) -> None:
    assert cluster_environment({}, tmp_path / "e")["PDSH_SSH_ARGS_APPEND"] == "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"
    mine = cluster_environment({"PDSH_SSH_ARGS_APPEND": "-p 2222"}, tmp_path / "e")["PDSH_SSH_ARGS_APPEND"]
    assert shlex.split(mine)[:2] == ["-p", "2222"] and "ServerAliveCountMax=2" in mine


def test_secrets_that_the_launcher_would_carry_by_itself_are_taken_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = cluster_environment(HERE, tmp_path / "e")
    assert "MLFLOW_TRACKING_TOKEN" not in told and told["PYTHONPATH"] == "/a:/b"
    assert "hf_abc" not in (tmp_path / "e").read_text()
    assert "HF_TOKEN, MLFLOW_TRACKING_TOKEN, WANDB_API_KEY not sent to other hosts" in caplog.text


def test_a_file_in_the_home_folder_is_not_used_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=1\n")
    monkeypatch.chdir("/")
    cluster_environment({"HOME": str(tmp_path)}, tmp_path / "e")
    assert f"{tmp_path}/.deepspeed_env is not used; set DS_ENV_FILE to it" in caplog.text
    assert (tmp_path / "e").read_text() == ""
