"""`trueup settings`: every setting with its value and meaning."""

from collections.abc import Iterator

import click
from pydantic import BaseModel, SecretStr

from trueup.cli.options import json_option
from trueup.cli.output import print_json, print_table, without_password
from trueup.settings.settings import PREFIX, get_settings


@click.command()
@json_option
def settings(as_json: bool) -> None:
    """List the settings and their values. Secrets stay hidden.

    trueup takes a setting from its environment variable, else from trueup.toml (or the file that TRUEUP_CONFIG names),
    else the default. The [host] mapping is in trueup.toml.

    \b
    Example:
      trueup settings
    """
    current = get_settings()
    rows = list(_rows(current, PREFIX))
    if as_json:
        print_json({variable: value for variable, value, _ in rows} | {"host": current.host.model_dump()})
        return
    print_table(("variable", "value", "meaning"), [(name, str(value), meaning) for name, value, meaning in rows])


def _rows(settings: BaseModel, prefix: str) -> Iterator[tuple[str, object, str]]:
    """Yield the variable, value and meaning of every setting, nested ones too."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            if name != "host":
                yield from _rows(value, f"{prefix}{name.upper()}__")
        else:
            yield f"{prefix}{name.upper()}", _value(value), field.description or ""


def _value(value: object) -> object:
    if isinstance(value, SecretStr) or (value and isinstance(value, tuple)):
        return "(set)"
    if isinstance(value, str):
        return without_password(value)
    return value if value is None or isinstance(value, int | float | str | dict) else str(value)
