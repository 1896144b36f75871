"""The project's `TRUEUP` setting: which models are what, and settings of trueup's own.

```python
TRUEUP = {
    "SUBSCRIPTION": "billing.Subscription",
    "TOKEN_PLAN": "billing.TokenPlan",
    "FULL_PLAN": "billing.FullPlan",
    "USAGE_LOG": "AI_model.AIUsageLog",
    "FIELDS": {"USAGE_LOG": {"total_tokens": "tokens"}},  # only where the names leave a doubt
    "MODEL_PROVIDER": "openai",                           # any setting of `trueup settings`
}
```
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings as project
from django.db import connections, router
from sqlalchemy.engine import URL

from trueup.django.mapping import Finding, Mapped, map_models
from trueup.errors import SettingsError
from trueup.host.fields import NOUNS
from trueup.settings.settings import Settings

SETTING = "TRUEUP"
MODEL_KEYS = {noun.upper(): noun for noun in NOUNS}
_OWN_KEYS = ("FIELDS", "DATABASE")
_REDIS = ("redis://", "rediss://", "redis+socket://", "sentinel://")
# What Django gives its own driver, and trueup's engine sets for itself.
_DJANGOS_OWN = {"cursor_factory", "context", "prepare_threshold", "client_encoding", "pool", "options", "assume_role"}
_URL_PARTS = {"user": "username", "password": "password", "host": "host", "port": "port"}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What the project's settings say. `findings`: what is wrong with them, or left in doubt."""

    own: dict[str, Any]
    mapped: Mapped
    findings: list[Finding] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """Return trueup's settings. Raises `SettingsError` if something is wrong or in doubt."""
        if self.findings:
            told = " ".join(f"{one.what} {one.remedy}" for one in self.findings)
            raise SettingsError(f"Wrong settings in the Django project, nothing was started. {told}")
        return self.own


def read_configuration() -> Configuration:
    """Read the project's settings and models. Raises nothing for wrong values: they become findings."""
    given = getattr(project, SETTING, {})
    if not isinstance(given, Mapping):
        wrong = Finding(what=f"{SETTING} is no dict.", remedy='Write TRUEUP = {"USAGE_LOG": "app.Model", …}.')
        return Configuration(own={}, mapped=Mapped(), findings=[wrong])
    findings = _unknown_keys(given)
    labels = {noun: given[key] for key, noun in MODEL_KEYS.items() if key in given}
    labels.setdefault("user", project.AUTH_USER_MODEL)
    mapped = map_models(labels, given.get("FIELDS") or {})
    own = {key.lower(): value for key, value in given.items() if key.lower() in Settings.model_fields}
    own["host"] = {**mapped.host, **own.get("host", {})}
    if "broker_url" not in own and str(getattr(project, "CELERY_BROKER_URL", "")).startswith(_REDIS):
        own["broker_url"] = project.CELERY_BROKER_URL
    if "database_url" not in own:
        alias, doubts = _alias(given, mapped)
        findings += doubts
        if alias is not None:
            url, doubts = _url_of(alias)
            findings += doubts
            own["database_url"] = url
    return Configuration(own=own, mapped=mapped, findings=[*findings, *mapped.findings])


def _unknown_keys(given: Mapping[str, Any]) -> list[Finding]:
    known = [*MODEL_KEYS, *_OWN_KEYS, *(name.upper() for name in Settings.model_fields)]
    findings = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = (
                f"Did you mean {near[0]}?" if near else "Its keys are models and the settings of `trueup settings`."
            )
            findings.append(Finding(what=f"{SETTING}[{key!r}] is no setting.", remedy=remedy))
    return findings


def _alias(given: Mapping[str, Any], mapped: Mapped) -> tuple[str | None, list[Finding]]:
    """Return the database that has the models. None: no model is known, or they are in several databases."""
    if "DATABASE" in given:
        if given["DATABASE"] in connections:
            return given["DATABASE"], []
        what = f"{SETTING}['DATABASE'] is {given['DATABASE']!r}, which is not in DATABASES."
        return None, [Finding(what=what, remedy=f"Use one of {', '.join(sorted(connections))}.")]
    aliases = {router.db_for_write(model) for model in mapped.found.values()}
    if len(aliases) <= 1:
        return next(iter(aliases), None), []
    what = f"The models are in several databases: {', '.join(sorted(aliases))}."
    remedy = "trueup needs them in one, because one transaction reads them. Set TRUEUP['DATABASE'] if they are."
    return None, [Finding(what=what, remedy=remedy)]


def _url_of(alias: str) -> tuple[str | None, list[Finding]]:
    """Return the URL of what Django connects to, with the options that libpq knows."""
    connection = connections[alias]
    if connection.vendor != "postgresql":
        what = f"DATABASES[{alias!r}] is {connection.vendor}."
        return None, [Finding(what=what, remedy="trueup needs PostgreSQL, where its gate locks the user's balance.")]
    given = {name: value for name, value in connection.get_connection_params().items() if name not in _DJANGOS_OWN}
    name = given.pop("dbname", None) or given.pop("database", None)
    parts = {part: given.pop(key, None) for key, part in _URL_PARTS.items()}
    if str(parts["host"] or "").startswith("/"):  # the folder of a socket
        given["host"] = parts["host"]
        parts["host"] = None
    port = parts.pop("port")
    url = URL.create(
        "postgresql",
        **{part: None if value is None else str(value) for part, value in parts.items()},
        port=int(port) if port else None,
        database=name,
        query={key: str(value) for key, value in given.items() if value is not None},
    )
    return url.render_as_string(hide_password=False), []
