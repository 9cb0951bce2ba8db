"""An authority and two certificates for the encrypted rows of `m2mkd bench teacher`, made for one run and thrown away with its folder."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Certificates:
    """PEM files; server and client were signed by the same authority."""

    authority: str
    server_cert: str
    server_key: str
    client_cert: str
    client_key: str

    @staticmethod
    def in_folder(folder: Path) -> Certificates:
        """Where `make_certificates` puts them."""
        names = ("authority.pem", "server.pem", "server.key", "client.pem", "client.key")
        return Certificates(*(str(folder / name) for name in names))


def make_certificates(folder: Path) -> str:
    """Make them by trustme or the command `openssl`. Returns why it cannot be done, or an empty string."""
    files = Certificates.in_folder(folder)
    try:
        import trustme
    except ImportError:
        if shutil.which("openssl") is None:
            return "no certificates: neither trustme (pip install trustme) nor the command openssl is there"
        return _by_openssl(folder, files)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(files.authority)
    for cert, key in ((files.server_cert, files.server_key), (files.client_cert, files.client_key)):
        issued = authority.issue_cert(HOST)
        issued.private_key_pem.write_to_path(key)
        for number, block in enumerate(issued.cert_chain_pems):
            block.write_to_path(cert, append=number > 0)
    return ""


def _by_openssl(folder: Path, files: Certificates) -> str:
    key, names = folder / "authority.key", folder / "names"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names.write_text(f"subjectAltName=IP:{HOST}\nextendedKeyUsage=serverAuth,clientAuth\n")
    calls = [["req", "-x509", *curve, "-keyout", str(key), "-out", files.authority, "-days", "2", "-subj", "/CN=bench authority"]]
    for cert, private, who in ((files.server_cert, files.server_key, "server"), (files.client_cert, files.client_key, "client")):
        request = str(folder / f"{who}.csr")
        calls.append(["req", *curve, "-keyout", private, "-out", request, "-subj", f"/CN={who}"])
        signed = ["-CA", files.authority, "-CAkey", str(key), "-CAcreateserial", "-extfile", str(names)]
        calls.append(["x509", "-req", "-in", request, *signed, "-out", cert, "-days", "2"])
    for words in calls:
        done = subprocess.run(["openssl", *words], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            return f"no certificates: openssl {words[0]} failed ({(done.stderr.strip().splitlines() or ['no message'])[-1]})"
    return ""
