"""`trueup settings`: every setting, its value, and what it is for."""

import click
from pydantic import SecretStr

from billing.settings import PREFIX, Settings, get_settings
from cli.context import json_option
from cli.output import print_json, print_table, without_password


@click.command()
@json_option
def settings(as_json: bool) -> None:
    """List the settings and where they stand; secrets stay hidden.

    A setting comes from its environment variable, else from trueup.toml (or the file that TRUEUP_CONFIG names), else it
    is the default. The [host] mapping stands in trueup.toml.

    \b
    Example:
      trueup settings
    """
    current = get_settings()
    rows = [
        (f"{PREFIX}{name.upper()}", _value(getattr(current, name)), field.description or "")
        for name, field in Settings.model_fields.items()
        if name != "host"
    ]
    if as_json:
        print_json({variable: value for variable, value, _ in rows} | {"host": current.host.model_dump()})
        return
    print_table(("variable", "value", "meaning"), [(name, str(value), meaning) for name, value, meaning in rows])


def _value(value: object) -> object:
    if isinstance(value, SecretStr):
        return "(set)"
    if isinstance(value, str):
        return without_password(value)
    return value if value is None or isinstance(value, int | float | str) else str(value)
