"""Reading files that lie elsewhere: one `Transport` for every kind of address, and the loop that tries again and resumes.

path, file://                plain files
http://, https://            data/remote/http_transport.py
pipe:COMMAND                 a shell command's output, where Access.allow_pipe says so
sftp, ftps, scp, ais, htgs   webdataset's gopen: other programs' output
s3, gs, hf, memory, ...      fsspec
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, Protocol, cast

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.remote.addresses import local_path, redact, scheme, scrub
from m2mkd_ds.data.remote.http_transport import CHUNK_BYTES, READ_TIMEOUT_S, HttpClient, HttpTransport, Refused
from m2mkd_ds.data.remote.retry import PROGRESS_BYTES, Patience, Retrier, TemporaryFault
from m2mkd_ds.data.shard_files import Access

GOPEN_SCHEMES = ("sftp", "ftps", "scp", "ais", "htgs")
_INSTALL = {"s3": "pip install 'm2mkd_ds[s3]'", "gs": "pip install 'm2mkd_ds[gs]'", "hf": "pip install huggingface_hub"}
_NO_RANGES = (
    "{kind} addresses give whole files only, and every sample would cost a whole shard; set data.cache_dir, so that shards are fetched once"
)


class Transport(Protocol):
    """One file elsewhere; every call is one try. Raises TemporaryFault for what may pass, ShardError for what will not."""

    def size(self, limit_s: float) -> int | None:
        """Bytes of the file; None when it cannot be known without reading it all."""
        ...

    def read(self, offset: int, size: int, limit_s: float) -> bytes:
        """`size` bytes at `offset`, fewer at the end of the file."""
        ...

    def stream(self, offset: int, limit_s: float) -> Iterator[bytes]:
        """All bytes from `offset` on."""
        ...


class LocalTransport:
    """A plain file, so that a cache on a local disk works for a folder on a slow one, too."""

    def __init__(self, address: str) -> None:
        self._path = local_path(address)

    def size(self, limit_s: float) -> int | None:
        with self._opened() as file:
            return os.fstat(file.fileno()).st_size

    def read(self, offset: int, size: int, limit_s: float) -> bytes:
        with self._opened() as file:
            file.seek(offset)
            return file.read(size)

    def stream(self, offset: int, limit_s: float) -> Iterator[bytes]:
        with self._opened() as file:
            file.seek(offset)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            with self._path.open("rb") as file:
                yield file
        except (FileNotFoundError, PermissionError) as err:
            raise Refused(f"{err.strerror}; check the path", is_absent=isinstance(err, FileNotFoundError)) from None
        except OSError as err:
            raise TemporaryFault(f"{type(err).__name__}: {err.strerror}") from None


class FsspecTransport:
    """s3, gs, hf and whatever else fsspec has a file system for; credentials are found as those libraries find them."""

    def __init__(self, address: str) -> None:
        import fsspec

        self._kind = scheme(address)
        try:
            # Listings are not cached: a size is looked up once, and the cache would hold the names of every file beside it.
            self._files, self._path = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as err:
            how = _INSTALL.get(self._kind, "install the package that it names")
            raise ShardError(f"{redact(address)}: {self._kind}:// needs a package that is not there ({scrub(str(err))}); {how}") from None

    def size(self, limit_s: float) -> int | None:
        with _fsspec_faults():
            return cast("int | None", self._files.info(self._path).get("size"))

    def read(self, offset: int, size: int, limit_s: float) -> bytes:
        with _fsspec_faults():
            return cast(bytes, self._files.cat_file(self._path, start=offset, end=offset + size)) if size else b""

    def stream(self, offset: int, limit_s: float) -> Iterator[bytes]:
        with _fsspec_faults():
            # No read-ahead of fsspec's own: the chunks are large and read in order.
            file = self._files.open(self._path, "rb", cache_type="none")
        with file:
            with _fsspec_faults():
                file.seek(offset)
            while True:
                with _fsspec_faults():
                    chunk = file.read(8 * CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk


@contextlib.contextmanager
def _fsspec_faults() -> Iterator[None]:
    """Sort what the libraries behind fsspec raise; they share no base class. Their texts may hold signed addresses."""
    try:
        yield
    except Exception as err:  # noqa: BLE001
        answer = getattr(err, "response", None)
        codes = [getattr(answer, "status_code", None), getattr(err, "status", None), getattr(err, "code", None)]
        final = isinstance(err, (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError))
        text = f"{type(err).__name__}: {scrub(str(err))[:300]}"
        if final or "Credentials" in type(err).__name__ or {401, 403, 404, "401", "403", "404"}.intersection(codes):
            advice = "check the address, and that the credentials of this file system are set and may read it"
            absent = isinstance(err, FileNotFoundError) or bool({404, "404"}.intersection(codes))
            raise Refused(f"{text}; {advice}", is_absent=absent) from None
        raise TemporaryFault(text) from None


class ProcessTransport:
    """A program that prints the file: whole files only; another try runs it again and drops what was had already."""

    def __init__(self, address: str, access: Access) -> None:
        self._address, self._kind = address, scheme(address)
        self._silence_s = access.deadline_s
        if self._kind == "pipe" and not access.allow_pipe:
            raise ShardError(
                f"{redact(address)}: this address runs a shell command on every node; set data.allow_pipe to true if you trust it"
            )

    def size(self, limit_s: float) -> int | None:
        return None

    def read(self, offset: int, size: int, limit_s: float) -> bytes:
        raise Refused(_NO_RANGES.format(kind=f"{self._kind}:"))

    def stream(self, offset: int, limit_s: float) -> Iterator[bytes]:
        process, _pipe = self._start()
        assert process.stdout is not None
        skip = offset
        try:
            while chunk := self._read(process.stdout.fileno()):
                kept, skip = chunk[skip:], max(0, skip - len(chunk))
                if kept:
                    yield kept
            status = process.wait(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            raise TemporaryFault("the command closed its output and did not end") from None
        finally:
            _end(process, own_group=self._kind == "pipe")
        if status in (126, 127) and self._kind == "pipe":
            raise Refused(f"the shell cannot run the command (exit status {status})")
        if status:
            raise TemporaryFault(f"the command ended with exit status {status}")

    def _start(self) -> tuple[subprocess.Popen[bytes], object]:
        """The process, and what closes its output when it is dropped."""
        if self._kind == "pipe":
            # A shell, because that is what a pipe: address asks for and data.allow_pipe has allowed; a session of its own, so that all of a
            # pipeline can be ended.
            command = self._address[len("pipe:") :]
            return subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
            ), None  # fmt: skip
        # webdataset.gopen is a function that hides the file of the same name. Its table is used and not the function itself,
        # because that rewrites addresses by the environment, which could turn any of them into a shell command.
        gopen = importlib.import_module("webdataset.gopen")
        try:
            pipe = gopen.gopen_schemes[self._kind](self._address, "rb", 0)
        except FileNotFoundError as err:
            raise ShardError(f"{redact(self._address)}: the program {err.filename!r} is not installed, and {self._kind} needs it") from None
        return cast("subprocess.Popen[bytes]", pipe.proc), pipe

    def _read(self, descriptor: int) -> bytes:
        poll = select.poll()  # select.select refuses descriptors above 1,023
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(self._silence_s * 1000):
            raise TemporaryFault(f"the command printed nothing for {self._silence_s:g} s")
        return os.read(descriptor, CHUNK_BYTES)


def _end(process: subprocess.Popen[bytes], *, own_group: bool) -> None:
    """End the process, if it still runs, with all it started; take its status."""
    assert process.stdout is not None
    process.stdout.close()
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            if own_group:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()


def http_client(named: str, access: Access) -> HttpClient:
    """Connections for a data set; `named` is the address that the user gave. A silence may take a quarter of the deadline."""
    return HttpClient(named, read_timeout_s=min(READ_TIMEOUT_S, max(0.5, access.deadline_s / 4)))


def open_transport(address: str, access: Access, client: HttpClient) -> Transport:
    """The transport for one file. Raises ShardError for an unknown scheme, a missing package or a command that is not allowed."""
    kind = scheme(address)
    if kind == "file":
        return LocalTransport(address)
    if kind in ("http", "https"):
        return HttpTransport(address, client)
    if kind == "pipe" or kind in GOPEN_SCHEMES:
        return ProcessTransport(address, access)
    return _by_fsspec(address)


def check_package(address: str) -> None:
    """Raises ShardError where the file system of the address needs a package that is not there."""
    if scheme(address) not in ("file", "http", "https", "pipe", *GOPEN_SCHEMES):
        _by_fsspec(address)


def _by_fsspec(address: str) -> Transport:
    from fsspec.registry import known_implementations, registry

    kind = scheme(address)
    if kind not in known_implementations and kind not in registry:
        raise ShardError(
            f"{redact(address)}: unknown scheme {kind!r}; allowed are a path, file://, http(s)://, s3://, gs://, hf://, other file systems "
            f"of fsspec, {', '.join(f'{name}://' for name in GOPEN_SCHEMES)}, and pipe:COMMAND with data.allow_pipe"
        )
    return FsspecTransport(address)


def chunks(transport: Transport, retrier: Retrier, what: str) -> Iterator[bytes]:
    """All bytes of a file, front to back, resumed where a try broke off. The deadline counts from the last real progress.

    Raises SampleError(kind="io") at the deadline, ShardError for what no other try can mend, Stopped when called off.
    """
    patience = Patience(retrier, what)
    received = marked = 0
    while True:
        try:
            for chunk in transport.stream(received, patience.left_s()):
                received += len(chunk)
                retrier.counter.add("bytes_fetched", len(chunk))
                if received - marked >= PROGRESS_BYTES:
                    marked = received
                    patience.progress()
                yield chunk
                patience.check()
        except TemporaryFault as fault:
            patience.pause(fault)
        except Refused as err:
            raise ShardError(f"{what}: {err}") from None
        else:
            retrier.gave_up = False
            return


class _Forward(io.RawIOBase):
    """Chunks as a file that is read once, front to back."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source, self._rest = source, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._source, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            cast(Any, self._source).close()
        super().close()


def open_stream(address: str, access: Access) -> BinaryIO:
    """A file elsewhere, to be read once from front to back; it is taken up again where a connection breaks. Close it after use.

    Reading raises SampleError(kind="io") after `access.deadline_s` without progress, ShardError for what no other try can mend.
    """
    transport = open_transport(address, access, http_client(address, access))
    return cast(BinaryIO, io.BufferedReader(_Forward(chunks(transport, Retrier(access.deadline_s), redact(address))), CHUNK_BYTES))
