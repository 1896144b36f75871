"""`trueup demo`, run once for all tests that check its output and its data."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.stack.helpers import temporary_home
from trueup.stack.processes import is_alive

DEADLINE_SECONDS = 400.0


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The result of the demo. `home`: the folder with its data."""

    home: Path
    code: int
    output: str
    errors: str

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment for commands that look at the demo's data afterwards."""
        return environment_of(self.home)


def environment_of(home: Path) -> dict[str, str]:
    """Return this process's environment with only that home, and with this Python's scripts first on PATH."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TRUEUP_")}
    scripts = str(Path(sys.executable).parent)
    return own | {"TRUEUP_HOME": str(home), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}


def processes_of(home: Path) -> list[psutil.Process]:
    """Return the living processes that work in a home or for it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            works_for = process.environ().get("TRUEUP_HOME") == str(home)
            if (works_for or Path(process.cwd()).is_relative_to(home)) and is_alive(process):
                found.append(process)
    return found


@pytest.fixture(scope="session")
def demo() -> Iterator[Demo]:
    with temporary_home() as home:
        result = subprocess.run(
            ["trueup", "demo"],
            env=environment_of(home) | {"TRUEUP_DATABASE_URL": "postgresql://unused@127.0.0.1:1/never-touched"},
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
        try:
            yield Demo(
                home=home / "demo",
                code=result.returncode,
                output=result.stdout,
                errors=result.stderr,
            )
        finally:
            for process in processes_of(home / "demo"):
                process.kill()
