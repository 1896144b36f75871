"""The example projects work by the commands of their README."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.conftest import cloned_database
from tests.support.worker import running_command
from trueup.stack import StackUrls

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass
class Ran:
    """What the commands of a README did, by command."""

    output: dict[str, str]
    codes: dict[str, int]

    def of(self, words: str) -> str:
        """Return the output of the one command that contains these words."""
        [output] = [text for command, text in self.output.items() if words in command]
        return output


def commands_of(readme: Path) -> list[tuple[str, int]]:
    """Return the commands after `$`, each with the exit code that its comment states."""
    found = re.findall(r"^\$ (.*?)(?:\s+# exit code (\d).*)?$", readme.read_text(), re.MULTILINE)
    return [(command, int(code or 0)) for command, code in found]


@pytest.fixture(scope="module")
def ran(stack: StackUrls, admin_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder, home = EXAMPLES / "django", tmp_path_factory.mktemp("example")
    with cloned_database(stack, admin_engine, "template1") as url:
        plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        bin_folder = Path(sys.executable).parent
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRUEUP_")} | {
            "DATABASE_URL": plain,
            "CELERY_BROKER_URL": str(stack.broker_url),
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRUEUP_HOME": str(home),
        }
        done = Ran({}, {})

        def run(commands: list[tuple[str, int]]) -> None:
            for command, code in commands:
                ended = subprocess.run(
                    shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, check=False
                )
                done.output[command] = ended.stdout + ended.stderr
                done.codes[command] = ended.returncode
                assert ended.returncode == code, f"{command}\n{ended.stdout}{ended.stderr}"

        commands = commands_of(folder / "README.md")
        first = [command for command, _ in commands].index("python manage.py check --database default") + 1
        run(commands[:first])
        worker = [bin_folder / "celery", "-A", "shop", "worker", "-l", "INFO", "-c", "1"]
        with running_command(worker, home / "worker.log", folder=folder, environment=environment):
            run(commands[first:])
        yield done


def test_the_drift_is_seen_before_anything_is_set_up(ran: Ran) -> None:
    assert "1,400" in ran.of("--read-only")


def test_the_project_is_sound_once_trueup_is_attached(ran: Ran) -> None:
    assert "trueup.W002" not in ran.of("check --database")


def test_one_task_is_charged_and_one_is_denied(ran: Ran) -> None:
    assert ran.of("summarize ada")
    assert "denied" in ran.of("summarize bob")


def test_the_drifted_counter_is_explained(ran: Ran) -> None:
    assert "1,400" in ran.of("reconcile") or "1,400" in ran.output["python manage.py trueup drift report"]
