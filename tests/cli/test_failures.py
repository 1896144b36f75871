"""Servers that do not answer, and closed pipes: one message and an exit code, without a traceback, within seconds."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import TRUEUP, trueup
from tests.support.host import Host
from trueup.cli import client

ARTICLE = Path(__file__).parents[2] / "examples" / "help_en.txt"
NOWHERE = "127.0.0.1:1"  # a port without a listener
PATIENCE_SECONDS = 20.0
RUN = ("run", "qa", "--user", 1, ARTICLE)

COMMANDS = [
    ("tokens", "show", 1),
    ("tokens", "check", 1),
    ("holds", "list"),
    ("status",),
    ("usage", "list", 1),
    ("reconcile",),
    ("reconcile", "--dry-run"),
    ("drift", "report"),
    ("db", "init"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(map(str, command)))
def test_without_a_database_each_command_names_it_and_the_remedy(
    database: str, settings: Callable[..., None], command: tuple[object, ...]
) -> None:
    settings(TRUEUP_DATABASE_URL=f"postgresql://app:hunter2@{NOWHERE}/app")
    result = trueup(*command, code=1)
    assert f"PostgreSQL at {NOWHERE}/app does not answer" in result.stderr
    assert "Start the server, or correct its URL" in result.stderr
    assert "hunter2" not in result.output


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers. Yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("variable", ["TRUEUP_BROKER_URL", "TRUEUP_RESULT_BACKEND_URL"])
@pytest.mark.parametrize("wait", [(), ("--wait",)], ids=["enqueueing", "waiting"])
def test_without_redis_run_says_so_at_once(
    database: str, settings: Callable[..., None], variable: str, wait: tuple[str, ...]
) -> None:
    settings(**{variable: f"redis://:hunter2@{NOWHERE}/0"})
    started = time.monotonic()
    result = trueup(*RUN, *wait, code=1)
    assert time.monotonic() - started < PATIENCE_SECONDS
    assert f"Redis at redis://:***@{NOWHERE}/0 does not answer" in result.stderr
    assert "Start the server, or correct its URL" in result.stderr
    assert "hunter2" not in result.output


@pytest.mark.parametrize("variable", ["TRUEUP_BROKER_URL", "TRUEUP_RESULT_BACKEND_URL"])
def test_a_redis_that_never_answers_is_not_waited_for(
    database: str,
    settings: Callable[..., None],
    silent_server: str,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 1.0)
    settings(**{variable: f"redis://{silent_server}/0"})
    started = time.monotonic()
    assert f"Redis at redis://{silent_server}/0 does not answer" in trueup(*RUN, code=1).stderr
    assert time.monotonic() - started < PATIENCE_SECONDS


@pytest.mark.parametrize("variable", ["TRUEUP_BROKER_URL", "TRUEUP_RESULT_BACKEND_URL"])
@pytest.mark.parametrize("url", ["redis://:hun/ter2@127.0.0.1:1/0", "redis://127.0.0.1:port/0"])
def test_a_redis_url_that_cant_be_read_is_refused_without_its_password(
    database: str, settings: Callable[..., None], variable: str, url: str
) -> None:
    settings(**{variable: url})
    result = trueup(*RUN, code=1)
    assert "can't be read" in result.stderr
    assert "ter2" not in result.output


def test_a_closed_pipe_ends_a_command_quietly(host: Host) -> None:
    host.log(host.subscriber(1_000), 300)
    trueup("reconcile")
    reading, writing = os.pipe()
    os.close(reading)
    commands = [
        subprocess.Popen(
            [TRUEUP, "drift", "report", "--format", form], stdout=writing, stderr=subprocess.PIPE, text=True
        )
        for form in ("table", "csv")  # by rich and by click
    ]
    os.close(writing)
    for command in commands:
        with command:
            assert (command.communicate()[1], command.returncode) == ("", 1)
