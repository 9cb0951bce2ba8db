"""TeacherConfig: who teaches, and where its outputs are made. A branch of the tree in config.py, which re-exports it.

How the feeds work is in docs/teacher_server.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

TEACHER_LIMITS: dict[str, tuple[float, float]] = {"prefetch": (1, 64), "deadline_s": (0.1, inf), "patience_s": (0.1, inf)}
"""Smallest and largest allowed value by field, below `teacher.`."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The monolithic teacher T: any timm VisionTransformer, cut into N stages."""

    arch: str = "deit_large_patch16_224"
    """timm model name."""
    arch_args: dict[str, Any] = field(default_factory=dict)
    """Extra arguments of `timm.create_model`, for example {embed_dim: 96, depth: 8, num_heads: 4, patch_size: 4}."""
    depths: tuple[int, ...] = (6, 6, 6, 6)
    """Blocks per stage; their number is N, the number of teaching pairs; their sum is the depth of the teacher."""
    source: Literal["incubate", "pretrained"] = "incubate"
    """incubate: Deep Incubation (pretrain_meta, modular_train, assemble_finetune). pretrained: `weights`, only M is trained."""
    weights: str = ""
    """For source=pretrained: a .safetensors or .pth file, or `timm` for the weights that timm's hub entry of `arch` names."""
    feed: Literal["colocated", "shm", "remote", "replay"] = "colocated"
    """Where phase m2mkd gets hidden states and teacher logits. colocated: made by the trainer itself. shm: by a `m2mkd teacher-server` on
    this host, through shared memory. remote: by teacher servers at `endpoints`. replay: logits from the files of `m2mkd teacher-export`."""
    endpoints: tuple[str, ...] = ()
    """Teacher servers: HOST:PORT, unix:PATH (feed=shm; default: RUN/teacher.sock), or one file:PATH that lists them one a line and is read
    again whenever it changes."""
    payload: Literal["hidden", "image", "logits"] = "hidden"
    """What a server sends. hidden: h_i, targets and logits. image: augmented images and logits, the trainer runs the prefix (pixels are
    uint8 with data.decode=fast). logits: these alone, the trainer reads the shards itself."""
    wire_dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    """Of hidden states on the way. auto: the precision of the phase, which changes no bit. fp16 is refused for values beyond its range.
    int8: one scale for 128 numbers, about 0.6 % of error, up to 2 % with outlier channels; never chosen by itself."""
    on_teacher_loss: Literal["wait", "fail", "colocate"] = "wait"
    """When no server answers. wait: for `patience_s`, then stop. fail: stop once each was tried. colocate: go on with the teacher in the
    trainer's own process, with the same bytes; needs the shards and the teacher's modules here."""
    prefetch: int = 3
    """Micro-batches that are asked for ahead."""
    deadline_s: float = 60.0
    """How long one answer may take, in seconds."""
    patience_s: float = 300.0
    """How long all tries for one micro-batch may take; below the time-out of collectives (600 s): the rank that starves then says why."""
    tls_ca: str = ""
    """PEM file of the authority that signed the servers' certificates; with it, connections are encrypted and servers checked."""
    tls_cert: str = ""
    """PEM file of this trainer's certificate, for servers that ask for one."""
    tls_key: str = ""
    """PEM file of its private key."""
    token_file: str = ""
    """File with the token that servers ask for; M2MKD_TEACHER_TOKEN in the environment does as well."""
    replay: str = ""
    """Folder that `m2mkd teacher-export` wrote, for feed=replay."""

    @property
    def is_remote(self) -> bool:
        """Whether another process makes what students learn from."""
        return self.feed in ("shm", "remote")


def check_teacher_config(teacher: TeacherConfig) -> None:
    """Refuse fields that do not fit together. Raises ValueError with one sentence."""
    if teacher.source == "pretrained" and not teacher.weights:
        raise ValueError("teacher.source=pretrained needs teacher.weights: a .safetensors or .pth file, or `timm`")
    if teacher.is_remote and teacher.wire_dtype == "int8" and teacher.payload != "hidden":
        raise ValueError(f"teacher.wire_dtype=int8 is for hidden states, and teacher.payload={teacher.payload} has none; use auto")
    if teacher.feed == "remote" and not teacher.endpoints:
        raise ValueError("teacher.feed=remote needs teacher.endpoints, for example --set teacher.endpoints=[10.0.0.7:8815], or [file:PATH]")
    if teacher.feed == "replay" and not teacher.replay:
        raise ValueError("teacher.feed=replay needs teacher.replay, the folder that `m2mkd teacher-export` wrote")
    if bool(teacher.tls_cert) != bool(teacher.tls_key):
        raise ValueError("teacher.tls_cert and teacher.tls_key belong together: give both or neither")
    if teacher.tls_cert and not teacher.tls_ca:
        raise ValueError("teacher.tls_cert without teacher.tls_ca: give the authority that signed the servers' certificates, too")
    if teacher.patience_s < teacher.deadline_s:
        raise ValueError(
            f"teacher.patience_s is {teacher.patience_s:g} and teacher.deadline_s is {teacher.deadline_s:g}: all tries together cannot end "
            "before one may; raise the first or lower the second"
        )
