"""What commands share: servers for as long as they run, and the arguments and options that several take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from trueup.accounts.user_ids import parse_user_id
from trueup.accounts.validation import check_estimate
from trueup.settings.settings import get_settings
from trueup.stack import Service, running_stack

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic since click 8.2 only


@contextmanager
def servers(*services: Service) -> Iterator[None]:
    """Have these servers: those set by URL, those of a running stack, or embedded ones for as long as this takes."""
    with running_stack(get_settings(), services=services):
        yield


class Parsed(ParamType):
    """An argument or option that `parse` reads from a text: it raises ValueError, with a message, for a wrong one."""

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


def parse_moment(value: str, examples: str) -> datetime:
    """Return a date or a time, UTC where no offset is given. Raises ValueError, which names the `examples`."""
    try:
        # The machine's own zone would make the answer depend on who asks.
        moment = datetime.fromisoformat(value.strip())
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is no time: give {examples}") from None


# A user id is of the host's own type.
USER = Parsed("user", lambda value: parse_user_id(value, get_settings().host.user_id_type))
TOKENS = Parsed("tokens", lambda value: parse_count(value, lambda tokens: check_estimate(tokens, "tokens")))

Command = Callable[..., Any]


def json_option(command: Command) -> Command:
    """Add `--json` as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
