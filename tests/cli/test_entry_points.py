"""The ways to call the command beside `trueup` itself: `celery -A proj trueup …` and `python -m trueup`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.host import Host
from trueup.settings.settings import get_settings

CELERY = Path(sys.executable).with_name("celery")
NOWHERE = "redis://127.0.0.1:1/0"

# An application that is not current by itself, whose tasks are imported when Celery needs them.
APPLICATION = """
import os
from celery import Celery
app = Celery("proj", broker=os.environ["HOST_BROKER_URL"], include=["poems"], set_as_current=False)
"""
TASKS = """
import trueup

@trueup.metered_task(feature_name="Poems", section="chat", estimated_tokens=100)
def write(model: trueup.Model, user_id: int) -> str:
    return model.complete([trueup.Message(role="user", content="Write a poem.")]).text
"""

InHost = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def in_host(database: str, tmp_path: Path) -> InHost:
    """Give a function that runs `celery -A proj trueup` with these words, in a project that has set its own broker."""
    (tmp_path / "proj.py").write_text(APPLICATION)
    (tmp_path / "poems.py").write_text(TASKS)
    environment = os.environ | {"HOST_BROKER_URL": str(get_settings().broker_url)}
    del environment["TRUEUP_BROKER_URL"]

    def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [CELERY, "-A", "proj", "trueup", *map(str, words)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )

    return run


def test_exit_codes_pass_through_celery(in_host: InHost, host: Host) -> None:
    user = host.subscriber(1_000)
    allowed = in_host("tokens", "check", user, "--tokens", 1_000)
    assert (allowed.returncode, allowed.stderr) == (0, "")
    assert in_host("tokens", "check", user, "--tokens", 1_001).returncode == 3
    misspelt = in_host("tokns")
    assert (misspelt.returncode, "No such command 'tokns'" in misspelt.stderr) == (2, True)
    away = in_host("tokens", "show", user, TRUEUP_DATABASE_URL="postgresql://x@127.0.0.1:1/x")
    assert (away.returncode, away.stderr.startswith("Error: PostgreSQL at ")) == (1, True)


def test_the_features_of_the_applications_own_tasks_are_listed(in_host: InHost) -> None:
    listed = in_host("rollout", "list", "--json")
    features = {feature["feature_name"] for feature in json.loads(listed.stdout)["features"]}
    assert {"Poems", "Q&A Generator"} <= features


def broker_errors(done: subprocess.CompletedProcess[str]) -> str:
    """Return doctor's errors about the broker."""
    assert done.returncode == 1, done.stderr  # no worker runs
    findings = json.loads(done.stdout)["findings"]
    return " ".join(found["what"] for found in findings if (found["check"], found["level"]) == ("redis", "error"))


def test_the_applications_broker_is_used_unless_a_setting_names_another(in_host: InHost) -> None:
    assert "127.0.0.1:1" in broker_errors(in_host("doctor", "--json", HOST_BROKER_URL=NOWHERE))
    named = {"HOST_BROKER_URL": NOWHERE, "TRUEUP_BROKER_URL": str(get_settings().broker_url)}
    assert broker_errors(in_host("doctor", "--json", **named)) == ""


def test_help_names_the_way_it_was_called(in_host: InHost) -> None:
    shown = in_host("doctor", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("Usage: celery trueup doctor [OPTIONS]")


def test_python_runs_the_package_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trueup", "tokns"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: python -m trueup [OPTIONS]")
    assert "No such command 'tokns'" in done.stderr
