"""The servers that a command needs, and the arguments and options that several commands share."""

import difflib
import getpass
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, get_args

import click

from trueup.accounts.user_ids import UserId, parse_user_id
from trueup.accounts.validation import check_estimate
from trueup.errors import UnknownUserError
from trueup.settings.settings import get_settings
from trueup.stack import Service, require_database, running_stack

if TYPE_CHECKING:
    from sqlalchemy import Connection

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only since click 8.2

Command = Callable[..., Any]

_BACK = re.compile(r"(\d{1,5})\s*([mhdw])", re.IGNORECASE)
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_MAX_BACK = timedelta(days=36_500)


@contextmanager
def servers(*services: Service, create: bool = False) -> Iterator[None]:
    """Provide the servers: by URL, of a running stack, or embedded for the time of the block.

    `create`: an embedded database may be created. Otherwise a home without one raises `StackError`: a new and empty
    database would answer each question wrongly.
    """
    if "postgres" in services and not create:
        require_database(get_settings())
    with running_stack(get_settings(), services=services):
        yield


class Parsed(ParamType):
    """A click type from a function `parse`, which raises ValueError with a message for a wrong text."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value  # a default
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_count(value: str, check: Callable[[int], int]) -> int:
    """Return a count of tokens that passes `check`. Raises ValueError."""
    try:
        tokens = int(value)
    except ValueError:
        raise ValueError(f"{value!r} is no whole number of tokens") from None
    return check(tokens)


def _parse_moment(value: str, examples: str) -> datetime:
    try:
        # UTC without an offset: with the machine's zone, the same command would differ between machines.
        moment = datetime.fromisoformat(value.strip())
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is no time: give {examples}") from None


def _parse_end(value: str) -> datetime:
    moment = _parse_moment(value, "2027-01-31 or 2027-01-31T08:30+01:00")
    if moment <= datetime.now(UTC):
        raise ValueError(f"{value!r} has passed: give a time in the future")
    return moment


def _parse_since(value: str) -> datetime | timedelta:
    back = _BACK.fullmatch(value.strip())
    if back:
        length = timedelta(**{_UNITS[back[2].lower()]: int(back[1])})
        if length > _MAX_BACK:
            raise ValueError(f"{value!r} is too far back: give at most {_MAX_BACK.days}d")
        return length
    moment = _parse_moment(value, "2026-11-01, 2026-11-01T08:30+01:00, 90m, 24h, 7d or 2w")
    if moment > datetime.now(UTC):
        raise ValueError(f"{value!r} is in the future: give a time in the past")
    return moment


def _parse_causes(value: str) -> tuple[str, ...]:
    from trueup.drift.causes import CAUSE_SENTENCES, Cause

    known = set(get_args(Cause)) | set(CAUSE_SENTENCES)
    causes = tuple(part.strip().lower().replace(" ", "_").replace("-", "_") for part in value.split("+"))
    for cause in causes:
        if cause not in known:
            near = difflib.get_close_matches(cause, sorted(known), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(known))}."
            raise ValueError(f"{cause!r} is no cause. {hint}")
    return causes


def _parse_rows(value: str) -> int | str:
    if value == "all":
        return value
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise ValueError(f'{value!r} is no count of rows: give a whole number, or "all"')
    return int(value)


# The type of a user id is a setting.
USER = Parsed("user", lambda value: parse_user_id(value, get_settings().host.user_id_type))
TOKENS = Parsed("tokens", lambda value: parse_count(value, lambda tokens: check_estimate(tokens, "tokens")))
# A date or time (UTC without an offset), or a length of time before now: 90m, 24h, 7d, 2w.
SINCE = Parsed("when", _parse_since)
# A date or time in the future (UTC without an offset).
END = Parsed("when", _parse_end)
# A cause, or several joined by "+": only drifts that have all of them.
CAUSE = Parsed("cause", _parse_causes)
# A count of rows, or "all".
ROWS = Parsed("rows", _parse_rows)
# The number of a run, a drift or a grant.
NUMBER = click.IntRange(1, 2**63 - 1)


def require_user(connection: "Connection", user: UserId | None) -> None:
    """Raise `UnknownUserError` for a user without a subscription. None: all users are meant."""
    from trueup.accounts.account import read_account

    if user is not None and not read_account(connection, user).subscribed:
        raise UnknownUserError(f"user: {user} has no subscription. Check the id, and the [host] mapping.")


def limit_option(default: int, most: int) -> Callable[[Command], Command]:
    """Return a decorator that adds `--limit`."""
    return click.option(
        "--limit", type=click.IntRange(1, most), default=default, show_default=True, help="The maximum number of rows."
    )


def this_user() -> str:
    """Return the name of the operating system's user, or the user's number if there is no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


# The reason of a decision, and the reason of a grant.
note_option = click.option("--note", required=True, help="The reason, for the audit.")
reason_option = click.option("--reason", required=True, help="The reason, for the audit.")
by_option = click.option(
    "--by", default=this_user, show_default="the user of this computer", help="Who decides, for the audit."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
since_option = click.option(
    "--since", type=SINCE, default=timedelta(hours=24), show_default="24h", help="From when on: 90m, 7d, 2026-11-01."
)


def time_of(since: datetime | timedelta | None) -> datetime | None:
    """Return the time that `--since` gives. None: it is not given."""
    return datetime.now(UTC) - since if isinstance(since, timedelta) else since


def hours_since(since: datetime | timedelta) -> int:
    """Return the whole hours from a time to now, at least one."""
    length = since if isinstance(since, timedelta) else datetime.now(UTC) - since
    return max(1, math.ceil(length / timedelta(hours=1)))


def one_format(form: str | None, as_json: bool) -> str | None:
    """Return the format that `--format` or `--json` gives. Raises a usage error if they differ."""
    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form} exclude each other: give one of them.")
    return "json" if as_json else form


def grant_options(command: Command) -> Command:
    """Add `--reason`, `--reference` and `--expires` of a grant."""
    for option in (
        click.option("--expires", type=END, help="When the rest of the grant expires.  [default: never]"),
        click.option("--reference", required=True, help="A unique key, such as a payment's id. A key grants once."),
        reason_option,
    ):
        command = option(command)
    return command
