"""The example projects work by the commands of their README, as a reader would type them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.conftest import cloned_database
from tests.support.api import free_port
from tests.support.waiting import wait_for
from trueup.extras import EXTRAS, PROVIDER_EXTRAS
from trueup.stack import StackUrls

EXAMPLES = Path(__file__).parents[2] / "examples"
BIN = Path(sys.executable).parent
# What a process of a README says when it is ready, by its command's words.
READY = {" worker ": " ready.", " beat ": "beat: Starting", "uvicorn ": "Uvicorn running"}


@dataclass
class Ran:
    """What the commands of a README printed, by command."""

    output: dict[str, str] = field(default_factory=dict)

    def of(self, words: str) -> str:
        """Return the output of the one command that contains these words."""
        [output] = [text for command, text in self.output.items() if words in command]
        return output


def blocks_of(readme: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each block of code: its language and its lines."""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL):
        yield language, block.splitlines()


def run(line: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a line such as `$ command   # exit code 1: why`. Returns its output."""
    command, _, comment = line.removeprefix("$ ").partition("   # exit code ")
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == int(comment[:1] or 0), f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@contextmanager
def running(command: str, log: Path, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a process of a README until the block ends. It is ready when given."""
    [ready] = [said for words, said in READY.items() if words in f"{command} "]
    with log.open("wb") as output:
        process = subprocess.Popen(shlex.split(command), cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        wait_for(lambda: ready in log.read_text() or process.poll() is not None, f"{command} is ready")
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait()


def play(name: str, url: str, broker: str, home: Path) -> Ran:
    """Do all that a README says: run its commands, and start the processes of its other terminals on the way."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    port = str(free_port())
    servers = {"django": {"DATABASE_URL": plain, "CELERY_BROKER_URL": broker}}.get(
        name, {"TRUEUP_DATABASE_URL": plain, "TRUEUP_BROKER_URL": broker, "TRUEUP_MODEL_PROVIDER": "offline"}
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("TRUEUP_")}
    environment = (
        own
        | servers
        | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "SHOP_URL": f"http://127.0.0.1:{port}",
            "TRUEUP_HOME": str(home),
        }
    )
    ran = Ran()
    with ExitStack() as processes:
        for language, lines in list(blocks_of(EXAMPLES / name / "README.md")):
            for line in lines:
                if language == "console":
                    ran.output[line] = run(line, EXAMPLES / name, environment)
                elif not line.startswith(("export ", "pip ")):
                    command = line.replace("--port 8001", f"--port {port}")
                    if " beat " in command:
                        command += f" --pidfile= --schedule {home / 'schedule'}"
                    log = home / f"{len(ran.output)}-{shlex.split(line)[2]}.log"
                    processes.enter_context(running(command, log, EXAMPLES / name, environment))
    return ran


@pytest.fixture(scope="module", params=["django", "fastapi"])
def ran(
    request: pytest.FixtureRequest, stack: StackUrls, admin_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ran]:
    with cloned_database(stack, admin_engine, "template1") as url:
        yield play(request.param, url, str(stack.broker_url), tmp_path_factory.mktemp("example"))


def test_the_drift_is_seen_before_anything_is_set_up(ran: Ran) -> None:
    assert "1,400" in ran.of("--read-only")


def test_one_task_is_charged_and_one_is_denied(ran: Ran) -> None:
    assert "denied" in ran.of("bob").lower() or "402" in ran.of("bob")
    charged = re.search(r"consumed\D*([\d,]+)", ran.of("tokens show"), re.IGNORECASE)
    assert charged is not None, ran.of("tokens show")
    assert int(charged[1].replace(",", "")) > 1_200


def test_the_drifted_counter_is_in_the_report(ran: Ran) -> None:
    [report] = [output for command, output in ran.output.items() if command.endswith("drift report")]
    assert "1,400" in report


def test_the_doctor_sees_that_the_projects_own_worker_does_the_upkeep(ran: Ran) -> None:
    assert "No worker consumes queue" not in ran.of("trueup doctor")
    assert "0 errors" in ran.of("trueup doctor")


@pytest.mark.parametrize("name", ["django", "fastapi"])
def test_the_requirements_of_an_example_hold_the_extra_that_its_model_provider_needs(name: str) -> None:
    """The tests run with all extras; a reader installs the example's requirements alone."""
    requirements = (EXAMPLES / name / "requirements.txt").read_text()
    [extra] = re.findall(r"^trueup\[(\w+)\]$", requirements, re.MULTILINE)
    assert set(PROVIDER_EXTRAS["offline"][1]) <= set(EXTRAS[extra])
