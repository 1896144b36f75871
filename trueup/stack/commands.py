"""The processes of the stack, in one table. `trueup up` runs it.

docker-compose.yml repeats it, and a test compares the two.
"""

from dataclasses import dataclass
from pathlib import Path

from trueup.settings.settings import PREFIX, Settings
from trueup.settings.urls import is_loopback

API = "api"

_CELERY = ("celery", "-A", "trueup.worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One process: the name before its log lines (in compose, its service), and its tokens.

    The first token is a console script of this Python environment, or a path to any program. `is_optional`: the stack
    runs on without it when it dies too often.
    """

    name: str
    tokens: tuple[str, ...]
    is_optional: bool = False


def stack_commands(home: Path) -> tuple[Command, ...]:
    """Return the workers, the beat and the API of the stack in `home`, in the order of their start."""
    schedule = str(home / "run" / "celerybeat-schedule")
    reconcile = ("-Q", "trueup-reconcile", "-n", "trueup-reconcile@%h")
    return (
        Command(name="worker", tokens=(*_CELERY, "worker", "-Q", "trueup-ai", "-n", "trueup-ai@%h")),
        # One process: a reconcile run mostly waits for the database, and more processes would wait for each other.
        Command(name="reconcile", tokens=(*_CELERY, "worker", *reconcile, "--concurrency=1")),
        # No pid file: it would be in the current folder, and the up lock already allows one beat for each home.
        Command(name="beat", tokens=(*_CELERY, "beat", "--pidfile=", "--schedule", schedule)),
        Command(name=API, tokens=("trueup", "api")),
    )


def embedded_settings(settings: Settings) -> dict[str, str]:
    """Return the variables that the embedded stack sets for its processes, where the user has set none.

    An embedded database means a trial, so the provider is `offline` and answers are made up. A database of the user's
    own has real users, so a provider must be set.
    """
    if settings.database_url is None and settings.model_provider is None:
        return {f"{PREFIX}MODEL_PROVIDER": "offline"}
    return {}


def page_settings(settings: Settings) -> dict[str, str]:
    """Return the variables by which the API serves its page alone, to this machine, where it has no key.

    The page of an embedded database is open to this machine: it is a trial. A database of the user's own has real
    users, so the page asks for a login link, which only someone with the database's settings can make.
    """
    api = settings.api
    if api.has_key or api.demo or api.local_page or not is_loopback(api.host):
        return {}
    return {f"{PREFIX}API__LOCAL_PAGE": "open" if settings.database_url is None else "login"}
