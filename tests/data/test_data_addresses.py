"""Facts of addresses: names are appended safely, and no secret of one is ever shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import table_dtype, write_index
from m2mkd_ds.data.remote.addresses import holds_secret, is_remote, join, local_path, redact, resolve_base, scheme, scrub


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("data/in1k", "file"),
        ("/data/a:b", "file"),
        ("file:///data", "file"),
        ("HTTPS://host/x", "https"),
        ("s3://bucket/x", "s3"),
        ("pipe:cat x", "pipe"),
    ],
)
def test_the_scheme_says_what_an_address_is(address: str, kind: str) -> None:
    assert scheme(address) == kind
    assert is_remote(address) == (kind != "file")


@pytest.mark.parametrize(
    ("base", "name", "expected"),
    [
        ("https://h/in1k/train/", "a b.tar", "https://h/in1k/train/a%20b.tar"),
        ("https://h/in1k?sig=1&x=2", "a.tar", "https://h/in1k/a.tar?sig=1&x=2"),
        ("s3://bucket/in1k", "sub/a.tar", "s3://bucket/in1k/sub/a.tar"),
        ("/data/in1k", "a.tar", "/data/in1k/a.tar"),
        ("file:///data/in%201k", "a.tar", "file:///data/in%201k/a.tar"),
        ("pipe:cat /data", "a.tar", "pipe:cat /data/a.tar"),
        ("pipe:aws s3 cp s3://b/{} -", "a.tar", "pipe:aws s3 cp s3://b/a.tar -"),
        ("pipe:cat /data", "a; rm -rf x", "pipe:cat /data/'a; rm -rf x'"),
    ],
)
def test_a_name_is_appended(base: str, name: str, expected: str) -> None:
    assert join(base, name) == expected


def test_a_file_url_is_its_path() -> None:
    assert local_path("file:///data/in%201k") == Path("/data/in 1k")
    assert local_path("data/in%201k") == Path("data/in%201k")
    with pytest.raises(ShardError, match="names a path of this machine"):
        local_path("file://host/data")


@pytest.mark.parametrize(
    ("address", "base", "expected"),
    [
        ("https://h/in1k", "", "https://h/in1k"),
        ("https://h/in1k", "tars", "https://h/in1k/tars"),
        ("https://h/in1k", "s3://b/x", "s3://b/x"),
        ("/data/index", "tars", "/data/index/tars"),
        ("/data/index", "/mnt/tars", "/mnt/tars"),
        ("/data/index", "pipe:cat /mnt", "pipe:cat /mnt"),
    ],
)
def test_the_base_is_where_the_index_says(address: str, base: str, expected: str) -> None:
    assert resolve_base(address, base) == expected


@pytest.mark.parametrize("base", ["/etc", "file:///etc", "pipe:cat /etc"])
def test_an_index_from_elsewhere_cannot_name_files_or_commands_of_this_machine(base: str) -> None:
    with pytest.raises(ShardError, match="may not name a folder or a command"):
        resolve_base("https://h/in1k", base)


SECRETS = [
    "https://user:s3cr3t@host/a/b.tar",
    "https://host/b.tar?X-Amz-Signature=s3cr3t&X-Amz-Expires=60",
    "https://host/b.tar?token=s3cr3t#s3cr3t",
    "s3://key:s3cr3t@bucket/b.tar",
    "pipe:curl -H 'Authorization: Bearer s3cr3t' https://host/b.tar",
]


@pytest.mark.parametrize("address", SECRETS)
def test_what_is_shown_of_an_address_holds_no_secret(address: str) -> None:
    assert "s3cr3t" not in redact(address)
    assert "s3cr3t" not in scrub(f"cannot open '{address}' (key 5)")
    assert holds_secret(address)


@pytest.mark.parametrize("address", ["https://host/a?download=true", "pipe:curl https://host/a", "/data/a", "s3://bucket/a"])
def test_a_plain_address_may_be_kept(address: str) -> None:
    assert not holds_secret(address)


def test_redaction_keeps_what_helps() -> None:
    assert redact("https://u:p@host:81/a/b.tar?x=1") == "https://***@host:81/a/b.tar?***"
    assert redact("pipe:curl -s x") == "pipe:curl ***"
    assert redact("pipe:PASS=s3cr3t curl x") == "pipe:***"
    assert redact("/data/a?b") == "/data/a?b"


def test_tokens_of_the_environment_are_blotted_out() -> None:
    assert scrub("a hf_abc b", {"HF_TOKEN": "hf_abc"}) == "a *** b"


def test_no_index_keeps_credentials(tmp_path: Path) -> None:
    table = np.zeros(0, dtype=table_dtype(1))
    with pytest.raises(ShardError, match="holds credentials") as caught:
        write_index(tmp_path, [], table, class_names=[], source="", license="", request={}, base="https://h/a?token=s3cr3t")
    assert "s3cr3t" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
