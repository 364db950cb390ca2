"""Entries of a file of tokens."""

from __future__ import annotations

import hashlib


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def table(secret: str, rights: str, experiment: str = "*", more: str = "") -> str:
    return (
        f'[[tokens]]\nname = "{secret}"\nsha256 = "{digest(secret)}"\nexperiment = "{experiment}"\n'
        f"rights = [{rights}]\n{more}\n"
    )
