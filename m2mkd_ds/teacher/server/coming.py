"""What transports call: a service, or the promise of one while the models are being loaded.

A server listens before it loads, so that an address that cannot be had is told at once, and trainers that come early are asked to wait.
"""

from __future__ import annotations

from typing import NoReturn, Protocol

from m2mkd_ds.teacher.protocol.wire import Answer, FeedError, GetBatch, Golden, Hello, Status, Welcome
from m2mkd_ds.teacher.server.admission import Caller, Lease
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService

RETRY_S = 1.0
"""Trainers that greet too early are asked to come again after this."""


class Service(Protocol):
    """The part of `TeacherService` that transports use; see there."""

    @property
    def options(self) -> ServiceOptions: ...

    def hello(self, hello: Hello, caller: Caller) -> Welcome: ...

    def golden_answering(self, request: Golden) -> Lease[Answer]: ...

    def answering(self, request: GetBatch) -> Lease[Answer]: ...

    def status(self, client: str) -> Status: ...

    def drain(self) -> None: ...


class ComingService:
    """Asks everybody to wait until `open` gives it a service, and passes on from then on. Safe from several threads."""

    def __init__(self, options: ServiceOptions) -> None:
        self.options = options
        self._service: TeacherService | None = None
        self._is_draining = False

    def open(self, service: TeacherService) -> None:
        """From now on this one answers."""
        self._service = service
        if self._is_draining:  # it was told to while there was none
            service.drain()

    def hello(self, hello: Hello, caller: Caller) -> Welcome:
        """Raises FeedError, as all of these do: retry_later while nothing is loaded, draining after `drain`."""
        return (self._service or self._refuse()).hello(hello, caller)

    def golden_answering(self, request: Golden) -> Lease[Answer]:
        """As `TeacherService`."""
        return (self._service or self._refuse()).golden_answering(request)

    def answering(self, request: GetBatch) -> Lease[Answer]:
        """As `TeacherService`."""
        return (self._service or self._refuse()).answering(request)

    def status(self, client: str) -> Status:
        """As `TeacherService`."""
        return (self._service or self._refuse()).status(client)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._is_draining = True
        if self._service is not None:
            self._service.drain()

    def _refuse(self) -> NoReturn:
        if self._is_draining:
            raise FeedError("draining", "this server is about to stop", endpoints=self.options.endpoints)
        raise FeedError("retry_later", "this server is still loading its models", retry_after_s=RETRY_S)
