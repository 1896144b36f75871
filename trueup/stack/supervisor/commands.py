"""The processes of the stack, as one table: `trueup up` runs them, docker-compose.yml repeats them.

A test compares the two token for token.
"""

from dataclasses import dataclass
from pathlib import Path

from trueup.settings.settings import PREFIX, Settings

API = "api"

_CELERY = ("celery", "-A", "trueup.worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One process: the name shown before its lines (and its service in compose), and its tokens.

    The first token is a console script of this Python environment, or a path to any program.
    """

    name: str
    tokens: tuple[str, ...]


def stack_commands(home: Path) -> tuple[Command, ...]:
    """Return the workers, the beat and the API of the stack in `home`, in the order they are started."""
    return (
        Command(name="worker", tokens=(*_CELERY, "worker", "-Q", "trueup-ai", "-n", "trueup-ai@%h")),
        Command(
            # One process: a reconcile run waits for the database, more of them only for each other.
            name="reconcile",
            tokens=(
                *(*_CELERY, "worker", "-Q", "trueup-reconcile", "-n", "trueup-reconcile@%h"),
                "--concurrency=1",
            ),
        ),
        Command(
            # No pid file: it would lie in the current folder, and the up lock already ensures that
            # there is one beat per home.
            name="beat",
            tokens=(
                *(*_CELERY, "beat", "--pidfile="),
                *("--schedule", str(home / "run" / "celerybeat-schedule")),
            ),
        ),
        Command(name=API, tokens=("trueup", "api")),
    )


def embedded_settings(settings: Settings) -> dict[str, str]:
    """Return the variables that the embedded stack sets for its processes, where the user has not.

    With the embedded database it is a trial, and answers are made up. With a database of the user's own nothing is
    assumed, for there they would reach real users.
    """
    if settings.database_url is None and settings.model_provider is None:
        return {f"{PREFIX}MODEL_PROVIDER": "offline"}
    return {}
