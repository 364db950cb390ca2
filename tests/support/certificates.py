"""Certificates that openssl makes."""

from __future__ import annotations

import subprocess
from pathlib import Path

_AUTHORITY = """
[ca]
default_ca = authority
[authority]
database = index.txt
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = names
x509_extensions = addresses
[names]
commonName = supplied
[addresses]
subjectAltName = DNS:localhost,IP:127.0.0.1
"""
"""For `openssl ca`: with others of its commands, only newer versions give a certificate any dates."""


def sign(folder: Path, name: str, by: str = "") -> dict[str, Path]:
    """A certificate for localhost, signed by itself or by another of the folder."""
    files = {kind: folder / f"{name}.{kind}" for kind in ("crt", "key")}
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-keyout", str(files["key"]), "-out", str(files["crt"]), "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-CA", str(folder / f"{by}.crt"), "-CAkey", str(folder / f"{by}.key")] if by else []
    subprocess.run(command, check=True, capture_output=True)
    return files


def expire(folder: Path, name: str, by: str) -> None:
    """Sign a certificate of the folder again, as one that expired years ago."""
    (folder / "authority").write_text(_AUTHORITY)
    (folder / "index.txt").touch()
    again = ["x509", "-x509toreq", "-in", f"{name}.crt", "-signkey", f"{name}.key", "-out", f"{name}.csr"]
    dates = ["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"]
    signers = ["-cert", f"{by}.crt", "-keyfile", f"{by}.key", "-in", f"{name}.csr", "-out", f"{name}.crt"]
    for command in (again, ["ca", "-batch", "-config", "authority", "-notext", *dates, *signers]):
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
