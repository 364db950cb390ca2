"""Certificates that openssl makes."""

from __future__ import annotations

import subprocess
from pathlib import Path


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
