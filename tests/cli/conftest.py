"""`trueup` in this process, by click's own runner; a subprocess where exit codes, signals or terminals matter."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.demo import environment_of, processes_of
from tests.worker.conftest import app, shared_database, shared_host, worker
from trueup.cli import main
from trueup.settings.settings import get_settings

__all__ = ["app", "shared_database", "shared_host", "worker"]

TRUEUP = Path(sys.executable).with_name("trueup")

Trueup = Callable[..., Result]


def trueup(*arguments: object, code: int = 0, stdin: str | bytes | None = None) -> Result:
    """Run a command that must end with that exit code, and without a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin, catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def trueup_json(*arguments: object, code: int = 0, stdin: str | bytes | None = None) -> Any:
    """Run a command with --json, and return what it prints."""
    return json.loads(trueup(*arguments, "--json", code=code, stdin=stdin).stdout)


@contextmanager
def started(*arguments: object, home: Path, stdout: Any = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """Start the real program in a home; killed at the end if it still runs."""
    with subprocess.Popen(
        [TRUEUP, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_of(home),
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Yield a function that sets environment variables (None: unsets) and resets the settings."""

    def change(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        get_settings.cache_clear()

    yield change
    get_settings.cache_clear()


def assert_nothing_runs(home: Path) -> None:
    left = processes_of(home)
    assert not left, [process.cmdline() for process in left]
