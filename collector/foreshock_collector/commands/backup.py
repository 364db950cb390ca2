"""`foreshock backup`: a copy of a collector's database, while the collector writes it."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from foreshock_collector.config import ConfigError, Parser
from foreshock_collector.state.database_file import APPLICATION, StoreError


def main(arguments: list[str]) -> int:
    """Copy a database. Return 2 if that failed; then no copy is left."""
    parser = Parser(
        prog="foreshock backup",
        description="Copy a collector's database, as it is at one moment, while the collector runs.",
        epilog="The copy is checked, and replaces FILE only when it is whole. Exit code 2: it could not be made.",
    )
    parser.add_argument("database", type=Path, help="the collector's database")
    parser.add_argument("output", type=Path, metavar="FILE", help="the copy; an older one is replaced")
    try:
        options = parser.parse_args(arguments)
        size = back_up(options.database, options.output)
    except (ConfigError, StoreError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    sys.stdout.write(f"{options.output}: {size:,} bytes\n")
    return 0


def back_up(database: Path, output: Path) -> int:
    """Copy a database to a new file. Return its size in bytes. Raises `StoreError`."""
    draft = output.with_name(f"{output.name}.draft")
    try:
        if output.exists() and output.samefile(database):
            raise StoreError(f"{output} is the database itself")
        draft.unlink(missing_ok=True)
        with (
            closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(draft)) as copy,
        ):
            if source.execute("PRAGMA application_id").fetchone() != (APPLICATION,):
                raise StoreError(f"{database} is not a Foreshock database")
            # All pages in one step: a single moment, and in WAL mode a reader keeps no writer waiting.
            source.backup(copy, pages=-1)
            (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise StoreError(f"{database} is damaged: {found}")
        draft.replace(output)
        return output.stat().st_size
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{database} cannot be copied to {output}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
