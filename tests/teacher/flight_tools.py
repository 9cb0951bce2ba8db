"""Certificates, requests and services that tests of the network transport share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
import trustme

from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.flight.security import ClientSecurity, ServerSecurity
from m2mkd_ds.teacher.protocol.wire import PROTOCOL_VERSION, Answer, GetBatch, Hello, Welcome
from m2mkd_ds.teacher.server.admission import Lease
from m2mkd_ds.teacher.server.service import TeacherService

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=2, world=2)
TOKEN = "correct-horse-battery-staple"


@dataclass(frozen=True)
class Pki:
    """An authority's files: ca.pem, and NAME.pem with NAME.key for what it signed."""

    folder: Path
    authority: trustme.CA

    @property
    def ca(self) -> str:
        return str(self.folder / "ca.pem")

    def issue(self, name: str, *names: str, days: float = 30.0) -> tuple[str, str]:
        """Certificate and key of a host or trainer; `days` < 0: expired."""
        start = min(datetime.now(timezone.utc), datetime.now(timezone.utc) + timedelta(days=days)) - timedelta(days=1)
        cert = self.authority.issue_cert(*(names or (name,)), not_before=start, not_after=datetime.now(timezone.utc) + timedelta(days=days))
        pem, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert.cert_chain_pems[0].write_to_path(pem)
        cert.private_key_pem.write_to_path(key)
        return str(pem), str(key)

    def server(self, token: str = TOKEN) -> ServerSecurity:
        cert, key = self.issue("server", "127.0.0.1", "localhost")
        return ServerSecurity(tls_cert=cert, tls_key=key, client_ca=self.ca, token=token)

    def client(self, token: str = TOKEN) -> ClientSecurity:
        cert, key = self.issue("trainer", "trainer.example")
        return ClientSecurity(self.ca, cert, key, token=token)


def make_pki(folder: Path) -> Pki:
    folder.mkdir(exist_ok=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return Pki(folder, authority)


def hello_of(service: TeacherService) -> Hello:
    return Hello(
        oldest_protocol=2, newest_protocol=PROTOCOL_VERSION, client="test", rank=0, layout=LAYOUT, pairs=(0, 1, 2), payload="hidden",
        wire_dtype="fp32", with_teacher=True, fingerprints=dict(service._fingerprints),
    )  # fmt: skip


def request_of(welcome: Welcome, step: int = 0, pairs: tuple[int, ...] = (1,), attempt: int = 0) -> GetBatch:
    return GetBatch(
        instance=welcome.instance, plan=welcome.plan, client="test", layout=LAYOUT, start=LAYOUT.positions(step, 0, 0).start, pairs=pairs,
        payload="hidden", wire_dtype="fp32", with_teacher=True, attempt=attempt,
    )  # fmt: skip


def pad_answers(service: TeacherService, megabytes: int) -> None:
    """Make every answer of a service larger by one tensor, so that it does not fit into sockets and windows at once."""
    plain = service.answering
    padding = torch.arange(megabytes * 2**20 // 8)

    def padded(request: GetBatch) -> Lease[Answer]:
        lease = plain(request)
        lease.answer = replace(lease.answer, tensors={**lease.answer.tensors, "padding": padding})
        return lease

    service.answering = padded  # type: ignore[method-assign]
