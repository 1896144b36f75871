"""Options of commands that are written down with who and why, and the moment at which something ends."""

import getpass
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click

from trueup.cli.context import Parsed, parse_moment

Command = Callable[..., Any]


def this_user() -> str:
    """Return the name of the operating system's user; in a container without names, the number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def by_option(command: Command) -> Command:
    """Add `--by`, who decides."""
    return click.option(
        "--by", default=this_user, show_default="the user of this computer", help="Who decides, for the audit."
    )(command)


def note_option(command: Command) -> Command:
    """Add `--note`, why."""
    return click.option("--note", required=True, help="Why, for the audit.")(command)


def _parse_end(value: str) -> datetime:
    moment = parse_moment(value, "2027-01-31 or 2027-01-31T08:30+01:00")
    if moment <= datetime.now(UTC):
        raise ValueError(f"{value!r} has passed: give a time in the future")
    return moment


END = Parsed("when", _parse_end)
"""The moment at which something ends: a date or a time, UTC where no offset is given."""
