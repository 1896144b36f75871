"""docker-compose.yml runs the commands of `trueup up`, in order, and contains no secret."""

import json
import os
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


@pytest.mark.parametrize(
    ("url", "done"),
    [
        ("postgresql://trueup:trial@postgres:5432/trueup", "trueup db init --with-host-tables"),
        ("postgresql://worker:secret@db.internal:5432/trueup", "trueup db init"),
        ("postgresql://worker:secret@db.internal:5432/app?application_name=x@postgres:5432/trueup2", "trueup db init"),
    ],
)
def test_only_the_trials_own_database_gets_tables_of_a_host(compose: dict[str, Any], url: str, done: str) -> None:
    shell, option, script = compose["services"]["migrate"]["command"]
    said = subprocess.run(
        [shell, option, script.replace("$$", "$").replace("exec trueup", "echo trueup")],
        env={**os.environ, "TRUEUP_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == done


def test_ports_are_published_to_this_machine_only(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for port in service.get("ports", []):
            assert str(port).startswith("127.0.0.1:")


def test_one_file_of_the_user_replaces_the_trials_servers(compose: dict[str, Any]) -> None:
    services = compose["services"]
    trial = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / "deploy/compose.env").read_text(), re.MULTILINE))
    password = services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert trial["TRUEUP_DATABASE_URL"] == f"postgresql://trueup:{password}@postgres:5432/trueup"
    for name in ("migrate", *(command.name for command in stack_commands(HOME))):
        # A variable in `environment` would win over the user's file.
        assert not set(trial) & set(services[name].get("environment", {}))
        assert services[name]["env_file"] == [
            {"path": "deploy/compose.env"},
            {"path": "trueup.env", "required": False},
        ]


def test_processes_can_write_only_where_they_must(compose: dict[str, Any]) -> None:
    for name in ("migrate", *(command.name for command in stack_commands(HOME))):
        service = compose["services"][name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["deploy"]["resources"]["limits"]["memory"]
        assert "./config:/etc/trueup:ro" in service["volumes"]
        assert service["working_dir"] == "/etc/trueup"


def test_no_health_check_starts_celery(compose: dict[str, Any]) -> None:
    checks = [
        service["healthcheck"].get("test", []) for service in compose["services"].values() if "healthcheck" in service
    ]
    checks.append(re.findall(r"HEALTHCHECK.*\n.*", (ROOT / "Dockerfile").read_text()))
    assert len(checks) > 5
    assert not [check for check in checks if "celery -A" in str(check)]


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
