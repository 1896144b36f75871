"""docker-compose.yml runs the commands of `trueup up`, in order, and contains no secret."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from trueup.stack.commands import stack_commands

ROOT = Path(__file__).parents[2]
HOME = Path("/var/lib/trueup")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(ROOT / "docker-compose.yml")
    return loaded


@pytest.mark.parametrize("command", stack_commands(HOME), ids=lambda command: command.name)
def test_compose_runs_the_same_commands_as_trueup_up(compose: dict[str, Any], command: Any) -> None:
    assert tuple(compose["services"][command.name]["command"]) == command.tokens


def test_every_process_waits_for_healthy_servers_and_the_migrations(
    compose: dict[str, Any],
) -> None:
    for command in stack_commands(HOME):
        conditions = {name: wait["condition"] for name, wait in compose["services"][command.name]["depends_on"].items()}
        assert conditions == {
            "postgres": "service_healthy",
            "redis": "service_healthy",
            "migrate": "service_completed_successfully",
        }
    for server in ("postgres", "redis"):
        assert compose["services"][server]["healthcheck"]["test"]


def test_host_tables_are_made_only_when_a_variable_says_so(compose: dict[str, Any]) -> None:
    assert compose["services"]["migrate"]["command"] == "trueup db init ${DB_INIT_OPTIONS:-}"


def test_ports_are_published_to_this_machine_only(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for port in service.get("ports", []):
            assert str(port).startswith("127.0.0.1:")


def test_the_password_comes_from_the_environment(compose: dict[str, Any]) -> None:
    from_environment = "${POSTGRES_PASSWORD:?set POSTGRES_PASSWORD}"
    services = compose["services"]
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"] == from_environment
    for name in ("migrate", *(command.name for command in stack_commands(HOME))):
        url = services[name]["environment"]["TRUEUP_DATABASE_URL"]
        assert url == f"postgresql://trueup:{from_environment}@postgres:5432/trueup"


def test_the_compose_file_is_valid() -> None:
    tool = Path(sys.executable).parent / "check-jsonschema"
    result = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_the_image_runs_a_worker_by_default() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)
    assert tuple(json.loads(command)) == stack_commands(HOME)[0].tokens
    assert f"TRUEUP_HOME={HOME}" in dockerfile
    assert "--require-hashes" in dockerfile
    assert re.search(r"^USER trueup$", dockerfile, re.MULTILINE)
