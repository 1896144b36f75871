"""A Django project with models of its own names. Prints as JSON what trueup makes of several `TRUEUP` settings."""

import json
import os
import sys
from typing import Any

import django
from django.conf import settings

POSTGRESQL = {
    "ENGINE": "django.db.backends.postgresql",
    "NAME": "shop",
    "USER": "ann",
    "PASSWORD": "p@ss/word#1",
    "HOST": "db.internal",
    "PORT": "5433",
    "OPTIONS": {"sslmode": "require", "options": "-c search_path=other"},
}
BASE = {"TOKEN_PLAN": "shop.Pack", "SUBSCRIPTION": "shop.Membership", "USAGE_LOG": "shop.ModelCall"}
CASES: dict[str, Any] = {
    "right": BASE,
    "all nouns": BASE | {"PAYMENT": "shop.Purchase", "TOKEN_USAGE": "shop.Deduction"},
    "named fields": BASE | {"FIELDS": {"USAGE_LOG": {"section": "note", "success": {"value": True}}}},
    "no log": {"SUBSCRIPTION": "shop.Membership"},
    "no such model": BASE | {"USAGE_LOG": "shop.Nothing"},
    "no label": BASE | {"USAGE_LOG": 7},
    "misspelt": BASE | {"USAGELOG": "shop.ModelCall"},
    "no such field": BASE | {"FIELDS": {"USAGE_LOG": {"totals": "spent"}}},
    "a doubtful counter": BASE | {"SUBSCRIPTION": "shop.Vague"},
    "a child's key": BASE | {"USAGE_LOG": "shop.SpecialCall"},
    "two keys to the user": BASE | {"SUBSCRIPTION": "shop.Transfer"},
    "two keys, one named": BASE | {"SUBSCRIPTION": "shop.Transfer", "FIELDS": {"SUBSCRIPTION": {"user_id": "to"}}},
    "several databases": BASE | {"USAGE_LOG": "shop.Elsewhere"},
    "no such database": BASE | {"DATABASE": "archive"},
    "another engine": BASE | {"DATABASE": "small"},
    "own url": BASE | {"DATABASE_URL": "postgresql://worker@db/app", "DATABASE": "default"},
    "no dict": "shop.ModelCall",
    "a wrong setting": BASE | {"HOLD_TTL_SECONDS": "long"},
}


class Router:
    def db_for_read(self, model: Any, **_: Any) -> str | None:
        return "second" if model.__name__ == "Elsewhere" else None

    db_for_write = db_for_read


def main() -> None:
    sys.path.insert(0, os.getcwd())
    settings.configure(
        SECRET_KEY="only for this test",
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "tests.django.shop", "trueup.django"],
        DATABASES={
            "default": POSTGRESQL,
            "second": POSTGRESQL | {"NAME": "second", "HOST": "/var/run/postgresql"},
            "small": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
        },
        DATABASE_ROUTERS=[Router()],
        CELERY_BROKER_URL="redis://broker:6379/3",
        TRUEUP={},
    )
    django.setup()
    from trueup.django.configuration import _url_of, read_configuration
    from trueup.errors import SettingsError
    from trueup.settings.settings import read_settings

    said: dict[str, Any] = {"socket": _url_of("second")[0]}
    for name, case in CASES.items():
        settings.TRUEUP = case
        configuration = read_configuration()
        findings = [f"{one.what} {one.remedy}" for one in configuration.findings]
        try:
            read = read_settings().model_dump(mode="json", include={"host", "database_url", "broker_url"})
        except SettingsError as error:
            read = {"error": str(error)}
        said[name] = {"findings": findings, **read}
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
