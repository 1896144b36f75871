"""What commands share: servers for as long as they run, and the arguments and options that several take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from trueup.accounts.user_ids import UserId, parse_user_id
from trueup.accounts.validation import check_estimate
from trueup.errors import InvalidInputError
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


class UserParameter(ParamType):
    """A user id of the host's own type."""

    name = "user"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> UserId:
        try:
            return parse_user_id(value, get_settings().host.user_id_type)
        except InvalidInputError as error:
            self.fail(str(error), param, ctx)


class TokensParameter(ParamType):
    """A count of tokens."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return check_estimate(int(value), "tokens")
        except ValueError as error:
            message = str(error) if isinstance(error, InvalidInputError) else f"{value!r} is no whole number of tokens"
            self.fail(message, param, ctx)


USER = UserParameter()
TOKENS = TokensParameter()

Command = Callable[..., Any]


def json_option(command: Command) -> Command:
    """Add `--json` as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
