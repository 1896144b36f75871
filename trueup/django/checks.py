"""`manage.py check`: what the project's settings, models and database leave to do for trueup."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage, Tags, register
from django.db import connections

from trueup.database.engine import connect
from trueup.django.configuration import SETTING, read_configuration
from trueup.errors import NotInstalledError, TrueupError
from trueup.install.install import check_installed


@register("trueup")
def check_configuration(**_: Any) -> list[CheckMessage]:
    """Check `TRUEUP` against the project's models. Contacts no server."""
    findings = read_configuration().findings
    return [checks.Error(one.what, hint=one.remedy, obj=SETTING, id="trueup.E001") for one in findings]


@register("trueup")
def check_driver(**_: Any) -> list[CheckMessage]:
    """Warn if Django changed its PostgreSQL driver because trueup brought psycopg 3 along."""
    if importlib.util.find_spec("psycopg2") is None:
        return []
    uses_psycopg_3 = any(
        getattr(connection, "Database", None) is not None and connection.Database.__name__ == "psycopg"
        for connection in connections.all(initialized_only=False)
    )
    if not uses_psycopg_3:
        return []
    return [
        checks.Warning(
            "Django uses psycopg 3, although psycopg2 is installed too.",
            hint="Call trueup.django.keep_psycopg2() at the top of the settings, or uninstall psycopg2.",
            id="trueup.W001",
        )
    ]


@register("trueup", Tags.database)
def check_database(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Check that the database is set up for these models. Only warns, because `migrate` runs this too."""
    if not databases or read_configuration().findings:
        return []
    try:
        with connect() as connection:
            check_installed(connection)
    except NotInstalledError as error:
        return [checks.Warning(str(error), hint="Run `manage.py trueup db attach`.", id="trueup.W002")]
    except TrueupError as error:
        return [checks.Warning(str(error), id="trueup.W003")]
    return []
