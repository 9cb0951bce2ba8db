"""`m2mkd teacher-server` and trainers of one: what goes wrong is told in one sentence, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2mkd_ds.cli.resolve import resolve
from m2mkd_ds.teacher.client.links import TeacherLostError, TeacherRefusedError
from m2mkd_ds.train import run_phase
from tests.cli.ended import Run


@pytest.mark.parametrize(("error", "code"), [(TeacherRefusedError("a:1 refuses (mismatch): seed"), 2), (TeacherLostError("nobody"), 1)])
def test_a_refusal_and_a_lost_teacher_are_sentences(
    m2mkd: Run, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, code: int, tmp_path: Path
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(run_phase, "run_phases", fails)
    ended = m2mkd("train", "--recipe", "tiny", "--run-dir", str(tmp_path / "run"), "--phase", "m2mkd")
    assert (ended.code, ended.err.splitlines()[-1]) == (code, f"m2mkd: {error}") and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--listen", "localhost"), "'localhost' is no address: give HOST:PORT"),
        (("--max-gb", "0"), "--max-gb is 0; give more than 0"),
    ],
)
def test_a_server_that_cannot_be_says_so_at_once(m2mkd: Run, words: tuple[str, ...], told: str) -> None:
    ended = m2mkd("teacher-server", "--recipe", "tiny", *words)
    assert ended.code == 2 and told in ended.err and "Traceback" not in ended.err


def test_a_plan_needs_no_run(m2mkd: Run) -> None:
    ended = m2mkd("teacher-server", "--recipe", "tiny", "--plan", "--network-gbps", "10", "--trainer-gpus", "2")
    assert ended.code == 0 and "jobs of 2 trainer GPUs" in ended.out and "Recommended" in ended.out


def test_settings_of_a_trainer_that_cannot_work_are_refused_with_the_config(m2mkd: Run, tmp_path: Path) -> None:
    def train(*settings: str) -> str:
        ended = m2mkd("train", "--recipe", "tiny", "--run-dir", str(tmp_path / "run"), "--phase", "m2mkd", "--set", *settings)
        assert ended.code == 2
        return ended.err

    assert "teacher.feed=remote needs teacher.endpoints" in train("teacher.feed=remote")
    assert "teacher.patience_s is 5 and teacher.deadline_s is 60" in train("teacher.patience_s=5")
    assert "int8 is for hidden states" in train("teacher.feed=shm", "teacher.wire_dtype=int8", "teacher.payload=logits")


def test_files_that_a_trainer_names_are_kept_as_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("feed=remote", "endpoints=[file:servers]", "tls_ca=ca.pem", "tls_cert=a/c.pem", "tls_key=a/c.key", "token_file=/etc/token")
    teacher = resolve(None, "tiny", "", [f"teacher.{word}" for word in words]).teacher
    assert teacher.endpoints == (f"file:{tmp_path}/servers",)
    assert (teacher.tls_ca, teacher.tls_cert) == (f"{tmp_path}/ca.pem", f"{tmp_path}/a/c.pem")
    assert (teacher.tls_key, teacher.token_file, teacher.replay) == (f"{tmp_path}/a/c.key", "/etc/token", "")
    endpoints = resolve(None, "tiny", "", ["teacher.feed=shm", "teacher.endpoints=[unix:s]"]).teacher.endpoints
    assert endpoints == (f"unix:{tmp_path}/s",)
    plain = resolve(None, "tiny", "", ["teacher.feed=remote", "teacher.endpoints=[host:1]"]).teacher
    assert plain.endpoints == ("host:1",) and plain.tls_ca == ""
