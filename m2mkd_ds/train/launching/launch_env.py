"""What ranks on other hosts find in their environment: RUN/launch.env, written for each launch over a hostfile.

DeepSpeed's launcher carries variables whose names begin with PYTHON, MLFLOW, MV2 and UCX (on GPUs NCCL too), and nothing else: not PATH,
not the number of threads. The rest it reads from a file of `NAME=VALUE` lines that DS_ENV_FILE names. It puts all of them, unquoted or in
double quotes, on a command line that pdsh and a shell on every host read. Hence a password has no place there, and a value that the
two would change is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from m2mkd_ds.config import ConfigError

SENT = (
    "PATH", "LD_LIBRARY_PATH", "CUDA_HOME", "OMP_NUM_THREADS", "DS_ACCELERATOR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "SSL_CERT_FILE",
)  # fmt: skip
SENT_PREFIXES = ("GLOO_", "HF_", "M2MKD_", "NCCL_", "TORCH_", "TRACKIO_", "TRANSFORMERS_", "WANDB_")
CARRIED_PREFIXES = ("PYTHON", "MLFLOW", "MV2", "UCX")
"""What the launcher carries by itself."""

KEEPALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"
"""With these, ssh ends about ten seconds after the link to a host has died; without them, it and the launcher wait for ever."""

_SECRET = re.compile(r"^AWS_|TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL")
_CHANGED = frozenset("$`\"\\%!\n")
"""Characters that a shell changes inside double quotes, and pdsh's own `%`."""


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds something that must not stand on a command line; the path of such a file may."""
    return bool(_SECRET.search(name.upper())) and not name.upper().endswith(("_PATH", "_FILE", "_DIR"))


def read_env_file(file: Path) -> dict[str, str]:
    """A user's `NAME=VALUE` lines. Raises ConfigError for a comment, an empty line, a secret or a value that would arrive changed."""
    if not file.is_file():
        raise ConfigError(f"DS_ENV_FILE {file}: no such file; scripts/deepspeed_env.example shows one")
    values = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        match = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", line)
        if not match:
            raise ConfigError(f"DS_ENV_FILE {file}, line {number}: {line!r}; expected NAME=VALUE, no comment and no empty line")
        if is_secret(match[1]):
            raise ConfigError(
                f"DS_ENV_FILE {file}, line {number}: {match[1]} would stand on a command line that every user of every host can read; "
                "put it into a file that each host reads by itself, such as ~/.netrc, ~/.aws/credentials or HF_TOKEN_PATH"
            )
        values[match[1]] = match[2]
    return values


def sent_environment(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What is sent of this environment, with the user's DS_ENV_FILE on top, and the names of secrets that stay here.

    Raises ConfigError for a value, sent by us or carried by the launcher, that a shell on the way would change.
    """
    chosen = {name: value for name, value in environ.items() if name in SENT or name.startswith(SENT_PREFIXES)}
    secrets = sorted(name for name in environ if is_secret(name) and name.startswith((*SENT_PREFIXES, *CARRIED_PREFIXES, "AWS_")))
    values = {name: value for name, value in chosen.items() if not is_secret(name)}
    if environ.get("DS_ENV_FILE"):
        values |= read_env_file(Path(environ["DS_ENV_FILE"]))
    carried = {name: value for name, value in environ.items() if name.startswith(CARRIED_PREFIXES) and not is_secret(name)}
    for name, value in {**carried, **values}.items():
        if _CHANGED & set(value):
            raise ConfigError(
                f"{name}={value!r} has a character that a shell on the way to the other hosts would change "
                "(one of $ ` \" \\ % ! or a line break); give another value or unset it"
            )
    return dict(sorted(values.items())), secrets


def write_env_file(file: Path, values: Mapping[str, str]) -> None:
    """Write the lines that the launcher reads, whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    temporary.replace(file)


def ignored_env_files(environ: Mapping[str, str], folder: Path) -> list[Path]:
    """Files that the launcher would have read by itself, and does not, because it is given another."""
    return [place / ".deepspeed_env" for place in (Path(environ.get("HOME", "/")), folder) if (place / ".deepspeed_env").is_file()]
