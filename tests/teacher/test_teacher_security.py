"""Rules before a port opens: certificates, tokens, addresses, and how often a token may be wrong. Every error names a flag or field."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from m2mkd_ds.config import ConfigError
from m2mkd_ds.teacher.flight import gate as flight_gate
from m2mkd_ds.teacher.flight.gate import FailureLimit
from m2mkd_ds.teacher.flight.security import (
    TOKEN_VARIABLE,
    ClientSecurity,
    ServerSecurity,
    find_token,
    is_loopback,
    join_address,
    split_address,
)
from m2mkd_ds.teacher.protocol.wire import FeedError
from tests.teacher.flight_tools import TOKEN, Pki, make_pki


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(autouse=True)
def no_token_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def test_loopback_needs_nothing_and_other_addresses_need_everything(pki: Pki) -> None:
    cert, key = pki.issue("server", "127.0.0.1")
    assert ServerSecurity().load("127.0.0.1").cert == b""
    with pytest.raises(ConfigError, match=r"--listen 0\.0\.0\.0 .* lacks --tls-cert, --tls-key, --client-ca, --token-file \(or M2MKD"):
        ServerSecurity().load("0.0.0.0")
    with pytest.raises(ConfigError, match=r"lacks --client-ca: give them"):
        ServerSecurity(tls_cert=cert, tls_key=key, token=TOKEN).load("10.0.0.7")
    with pytest.raises(ConfigError, match=r"lacks --token-file \(or M2MKD_TEACHER_TOKEN in the environment\): give them"):
        ServerSecurity(tls_cert=cert, tls_key=key, client_ca=pki.ca).load("teacher.example")
    keys = ServerSecurity(tls_cert=cert, tls_key=key, client_ca=pki.ca, token=TOKEN).load("0.0.0.0")
    assert keys.cert == Path(cert).read_bytes() and keys.authority == Path(pki.ca).read_bytes()


def test_insecure_is_allowed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ServerSecurity(insecure=True, token=TOKEN).load("0.0.0.0")
    assert "with --insecure and without --tls-cert, --tls-key, --client-ca:" in caplog.text
    assert TOKEN not in caplog.text


def test_loopback_is_known_by_address() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example", "localhost.example")))


@pytest.mark.parametrize("address", ["host:1", "10.0.0.7:8815", "[::1]:0", "[2001:db8::1]:65535"])
def test_addresses_round_trip(address: str) -> None:
    assert join_address(*split_address(address)) == address


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:-1", "host:65536", "::1:80", "[host]:1", "host:1x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address: give HOST:PORT"):
        split_address(address)


def test_certificates_are_checked_before_anything_listens(pki: Pki, tmp_path: Path) -> None:
    cert, key = pki.issue("server", "127.0.0.1")
    other_cert, other_key = pki.issue("other", "127.0.0.1")
    old_cert, old_key = pki.issue("old", "127.0.0.1", days=-1)
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    locked = tmp_path / "locked.key"
    private = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    table = [
        (cert, "", "--tls-cert and --tls-key belong together"),
        (cert, str(tmp_path / "none.key"), r"--tls-key .*none\.key cannot be read \(No such file"),
        (str(text), key, r"--tls-cert .*text\.pem is no PEM file"),
        (str(broken), key, r"--tls-cert .*broken\.pem with --tls-key .* cannot be used"),
        (cert, other_key, r"--tls-key .*other\.key is not the private key of --tls-cert .*server\.pem"),
        (cert, str(locked), r"locked\.key cannot be used \(the key is encrypted\)"),
        (old_cert, old_key, r"--tls-cert .*old\.pem is of no use as a server's certificate: certificate has expired"),
    ]
    for tls_cert, tls_key, told in table:
        with pytest.raises(ConfigError, match=told):
            ServerSecurity(tls_cert=tls_cert, tls_key=tls_key).load("127.0.0.1")
    with pytest.raises(ConfigError, match="--client-ca without --tls-cert"):
        ServerSecurity(client_ca=pki.ca).load("127.0.0.1")
    with pytest.raises(ConfigError, match="holds no authority's certificate"):
        ServerSecurity(tls_cert=cert, tls_key=key, client_ca=other_cert).load("127.0.0.1")
    with pytest.raises(ConfigError, match=r"teacher\.tls_cert .*old\.pem is of no use as a client's certificate: certificate has expired"):
        ClientSecurity(pki.ca, old_cert, old_key).load()
    with pytest.raises(ConfigError, match=r"teacher\.tls_cert without teacher\.tls_ca"):
        ClientSecurity("", cert, key).load()
    assert ClientSecurity(pki.ca, other_cert, other_key).load().key == Path(other_key).read_bytes()


def test_a_token_comes_from_a_private_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"--token-file .*token can be opened by others \(mode 640\): run `chmod 600`"):
        find_token(str(file), "", "--token-file")
    file.chmod(0o600)
    assert find_token(str(file), "", "--token-file") == TOKEN
    assert find_token("", "", "--token-file") == ""
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")
    assert find_token("", "", "--token-file") == "from-the-environment"
    assert find_token(str(file), "", "--token-file") == TOKEN  # what was named explicitly wins
    with pytest.raises(ConfigError, match=r"none cannot be read \(No such file"):
        find_token(str(tmp_path / "none"), "", "--token-file")


@pytest.mark.parametrize("token", ["short", "x" * 1025, "with space in the middle", "ümlaut-ümlaut-ümlaut"])
def test_a_token_that_cannot_be_one_is_not_repeated_in_the_error(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="16 to 1024 ASCII characters") as refused:
        find_token(str(file), "", "--token-file")
    assert token not in str(refused.value)


def test_no_secret_is_shown(pki: Pki) -> None:
    security = pki.client()
    keys = security.load()
    assert TOKEN not in repr(security) + repr(keys) + repr(ServerSecurity(token=TOKEN)) and "PRIVATE" not in repr(keys)
    assert keys.has_token(TOKEN.encode()) and not keys.has_token(TOKEN[:-1].encode()) and not keys.has_token(b"")


def test_wrong_tokens_are_counted_by_host_within_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(flight_gate.time, "monotonic", lambda: now[0])
    limit = FailureLimit()
    for port in range(10):
        limit.check(f"ipv4:10.0.0.7:{port}")
        limit.count(f"ipv4:10.0.0.7:{port}")
    limit.check("ipv4:10.0.0.8:1")
    now[0] += 20.0
    with pytest.raises(FeedError, match=r"10 calls with a wrong token came from 10\.0\.0\.7: wait 40 s") as refused:
        limit.check("ipv4:10.0.0.7:99")
    assert refused.value.code == "unauthenticated" and refused.value.retry_after_s == 40.0
    now[0] += 41.0
    limit.check("ipv4:10.0.0.7:99")
    for host in range(3000):
        limit.count(f"ipv6:[2001:db8::{host:x}]:1")
    assert len(limit._failures) == 1024 and list(limit._failures)[-1] == "[2001:db8::bb7]"  # 2999 = 0xbb7
