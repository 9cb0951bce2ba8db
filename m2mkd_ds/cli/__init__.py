"""The command line: `m2mkd VERB ...`. Each verb is a small function; heavy rooms are imported inside it, so `--help` is quick.

A pre-parser takes what the `deepspeed` launcher and its users add (`--local_rank N`, `--deepspeed`, `--deepspeed_config FILE`),
tyro parses the rest. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 stopped on request with everything saved (the same
command goes on), 76 a rank hung and was ended by its watchdog, 77 a loss or gradient became NaN or infinite,
130 interrupted by Ctrl-C (verbs other than train and pipeline, which save and end with 75).
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from m2mkd_ds import __version__

from m2mkd_ds.cli import (  # noqa: F401  # isort: skip  (they register their verbs, which --help lists in the order of app.VERBS)
    bench, bench_memory, checkpoints, export, few_shot, onnx, plan, probe, results, run, shards, shards_check, teacher, timm_folders,
)  # fmt: skip
from m2mkd_ds.cli.app import app, bench_app, out, shards_app
from m2mkd_ds.config import ConfigError

INTERRUPTED_CODE = 130
"""What shells give for a command that Ctrl-C ended: 128 + SIGINT."""
_TAUGHT_VERBS: dict[str, Callable[..., None]] = {
    "few-shot": few_shot.few_shot, "teacher-server": teacher.teacher_server, "teacher-export": teacher.teacher_export,
    "onnx": onnx.onnx, "plan": plan.plan, "probe-batch": probe.probe_batch,
}  # fmt: skip
"""Verbs whose own --help says more than the line that lists them."""


def take_launcher_flags(argv: Sequence[str]) -> list[str]:
    """Remove the flags that the launcher and DeepSpeed's users add; what they say goes to the environment."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--local_rank", "--local-rank", type=int)
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--deepspeed_config", "--deepspeed-config", default="")
    known, rest = parser.parse_known_args(list(argv))
    if known.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(known.local_rank))
    if known.deepspeed_config:
        os.environ["M2MKD_DS_CONFIG"] = str(Path(known.deepspeed_config).resolve())
    return rest


def join_overrides(argv: Sequence[str]) -> list[str]:
    """`--set a=1 --set b=2` -> `--set a=1 b=2` at the end: the parser alone would keep the last --set and forget the others."""
    rest: list[str] = []
    assignments: list[str] = []
    inside = first = False  # behind --set; the very next word belongs to it even without `=`, to be refused as an override
    for word in argv:
        if word == "--set":
            inside = first = True
        elif word.startswith("--set="):
            assignments.append(word.removeprefix("--set="))
            inside = True
        elif inside and not word.startswith("-") and (first or "=" in word):
            assignments.append(word)
            first = False
        else:
            rest.append(word)
            inside = first = False
    return [*rest, "--set", *assignments] if assignments else rest


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `m2mkd` and `python -m m2mkd_ds`."""
    arguments = join_overrides(take_launcher_flags(sys.argv[1:] if argv is None else argv))
    if arguments[:1] == ["--version"]:
        out(__version__)
        return
    try:
        if arguments[:1] == ["shards"]:
            shards_app.cli(prog="m2mkd shards", description="Webdataset shards with an index.", args=arguments[1:])
            return
        if arguments[:1] == ["bench"]:
            bench_app.cli(prog="m2mkd bench", description="Measurements against other projects.", args=arguments[1:])
            return
        if arguments[:1] and arguments[0] in _TAUGHT_VERBS:
            tyro.cli(_TAUGHT_VERBS[arguments[0]], prog=f"m2mkd {arguments[0]}", args=arguments[1:])
            return
        app.cli(
            prog="m2mkd",
            description="Module-to-module distillation (m2mKD) of a ViT into a sparse V-MoE.",
            args=arguments,
        )
    except (ConfigError, ValueError, FileNotFoundError) as err:
        # One clear sentence for what a user can cause; anything else keeps its traceback.
        if os.environ.get("M2MKD_DEBUG"):
            raise
        text = str(err)
        if isinstance(err, FileNotFoundError) and err.filename and err.strerror:  # the system's own: "[Errno 2] ..."
            text = f"{err.filename}: {err.strerror}"
        sys.stderr.write(f"m2mkd: {text}\n")
        sys.exit(2)
    except OSError as err:
        if os.environ.get("M2MKD_DEBUG") or not (err.filename and err.strerror):
            raise
        sys.stderr.write(f"m2mkd: {err.filename}: {err.strerror}\n")
        sys.exit(2 if isinstance(err, (NotADirectoryError, IsADirectoryError, PermissionError)) else 1)
    except ImportError as err:
        if os.environ.get("M2MKD_DEBUG") or "pip install" not in str(err):
            raise
        sys.stderr.write(f"m2mkd: {err}\n")  # an optional package, and how to get it
        sys.exit(2)
    except KeyboardInterrupt:  # training has its own answer to Ctrl-C (it saves); the other verbs have nothing to save
        if os.environ.get("M2MKD_DEBUG"):
            raise
        sys.stderr.write("m2mkd: interrupted\n")
        sys.exit(INTERRUPTED_CODE)
    except Exception as err:
        # Errors whose text is a sentence for people name their own code, which the records of a job hold as well (train/ending/guard.py).
        code = getattr(err, "exit_code", None)
        if not isinstance(code, int):
            raise
        if os.environ.get("M2MKD_DEBUG"):
            traceback.print_exc()
        if not getattr(err, "is_told", False):  # of a stop that another process tells
            _say(err)
        sys.exit(code)


def _say(err: Exception) -> None:
    """One line on stderr, whose reader may have gone with a launcher that was killed: the exit code must come out all the same."""
    from m2mkd_ds.train.ending.closed_output import outliving_readers

    with outliving_readers():
        sys.stderr.write(f"m2mkd: {err}\n")
        sys.stderr.flush()
