"""A teacher server in a process of its own, to be frozen and measured: folder and config come as arguments, the port goes out.

Ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from m2mkd_ds.config import from_dict
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.teacher.flight.security import ServerSecurity
from m2mkd_ds.teacher.flight.server import FlightTransport
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService
from tests.teacher.conftest import LIMITS, make_parts, tiny_fingerprints
from tests.teacher.flight_tools import pad_answers


def main() -> None:
    folder = Path(sys.argv[1])
    config = from_dict(json.loads((folder / "config.json").read_text()))
    index = ShardIndex.load(config.data.train)
    options = ServiceOptions(limits=LIMITS, max_bytes=256 * 2**20)
    service = TeacherService(Producer(make_parts(config, index)), tiny_fingerprints(config, index), options)
    pad_answers(service, 48)
    files = {"tls_cert": "server.pem", "tls_key": "server.key", "client_ca": "ca.pem", "token_file": "token"}
    security = ServerSecurity(**{name: str(folder / file) for name, file in files.items()})
    transport = FlightTransport(service, "127.0.0.1:0", security)
    transport.start()
    print(transport.endpoint, flush=True)
    sys.stdin.read()
    transport.stop(0.0)
    service.close()


if __name__ == "__main__":
    main()
