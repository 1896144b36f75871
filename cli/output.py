"""How things are shown: JSON for machines, tables for people."""

import json
import re
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import click

from trueup.cli.tables import ASCII, BOX, table_lines

# Wide enough for every table of ours where no terminal says otherwise: a piped table must not be cut.
PIPED_WIDTH = 200


# What a host's id or name may hold and a terminal would obey.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

# A password may contain "/" and "@", so that it ends at the last "@"; a sentinel URL names several servers, each with
# its own. libpq takes it as a parameter too.
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):(?:(?!://).)*@")
_PASSWORD_PARAMETER = re.compile(r"(?<=[?&])([a-z_]*password)=[^&]*", re.IGNORECASE)


def without_password(url: str) -> str:
    """Return the URL, or any text, with three stars for a password in it."""
    return _PASSWORD_PARAMETER.sub(r"\1=***", _PASSWORD.sub(r"\1:***@", url))


def print_json(content: Any) -> None:
    """Print anything of ours as JSON: dataclasses as objects, times as ISO 8601, ids as they are."""
    click.echo(json.dumps(content, default=_plain, indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, uuid.UUID | Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None, empty: str = "None."
) -> None:
    """Print a table; numbers are right-aligned. `empty` is said when there are no rows."""
    if not rows:
        click.echo(empty)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_WIDTH
    head, body = table_lines(
        headings,
        [[show(value) for value in row] for row in rows],
        right=[
            all(row[column] is None or isinstance(row[column], int) for row in rows) for column in range(len(headings))
        ],
        width=width,
        lines=BOX if _can_print(BOX.top + BOX.body) else ASCII,
    )
    if title:
        click.echo(title)
    # At once: click flushes after each call, and a table may have very many rows.
    click.secho("\n".join(head), bold=True)
    click.echo("\n".join(body))


def _can_print(text: str) -> bool:
    """Return whether standard output's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def print_facts(facts: dict[str, Any]) -> None:
    """Print names and values, one a line."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {show(value)}")


def show(value: Any) -> str:
    """Return a value as people read it: thousands apart, times to the second in UTC, nothing as a dash.

    A control character is shown as �: a terminal would obey it.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return _CONTROL.sub("�", str(value))
