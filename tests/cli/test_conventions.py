"""What all commands share: JSON objects, exit codes, flags, names, and outputs that can't take everything."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import TRUEUP, trueup, trueup_json
from tests.support.host import Host
from tests.support.worker import close_connections, own_application

USER_COMMANDS = [
    ("tokens", "show", 999),
    ("tokens", "grants", 999),
    ("usage", "list", 999),
    ("holds", "list", "--user", 999),
    ("drift", "explain", 999),
    ("drift", "review", "--user", 999),
    ("reconcile", "--user", 999),
]


@pytest.mark.parametrize("command", USER_COMMANDS, ids=lambda command: " ".join(map(str, command)))
def test_an_unknown_user_is_an_error_in_every_command_and_nothing_is_written(
    host: Host, command: tuple[object, ...]
) -> None:
    assert "user: 999 has no subscription" in trueup(*command, code=1).stderr
    assert host.value("SELECT count(*) FROM trueup.reconcile_run") == 0


USER = "USER"  # stands for the id of a user

JSON_COMMANDS = [
    ("tokens", "show", USER),
    ("tokens", "check", USER),
    ("tokens", "grants", USER),
    ("usage", "list", USER),
    ("holds", "list"),
    ("status",),
    ("drift", "history"),
    ("drift", "review"),
    ("drift", "explain", USER),
    ("reconcile", "--dry-run"),
    ("rollout", "list"),
    ("rollout", "history"),
    ("alerts", "list"),
    ("queues", "dead"),
    ("settings",),
]


@pytest.mark.parametrize("command", JSON_COMMANDS, ids=" ".join)
def test_the_json_of_each_command_is_an_object_with_its_version(host: Host, command: tuple[str, ...]) -> None:
    user = host.subscriber()
    assert trueup_json(*(user if word == USER else word for word in command))["schema_version"] >= 1


@pytest.mark.parametrize("command", [("drift", "report"), ("drift", "history")], ids=" ".join)
def test_json_and_another_format_exclude_each_other(host: Host, command: tuple[str, ...]) -> None:
    said = trueup(*command, "--json", "--format", "csv", code=2).stderr
    assert "--json and --format csv exclude each other" in said


@pytest.mark.parametrize(
    ("words", "near"), [(("drft",), "drift"), (("drift", "reprot"), "report"), (("tokens", "chek"), "check")]
)
def test_a_misspelt_command_names_the_nearest(words: tuple[str, ...], near: str) -> None:
    assert f"Did you mean '{near}'?" in trueup(*words, code=2).stderr


def test_the_shell_completes_commands() -> None:
    words = {"COMP_WORDS": "trueup dr", "COMP_CWORD": "1", "_TRUEUP_COMPLETE": "bash_complete"}
    done = subprocess.run([TRUEUP], env=os.environ | words, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["plain,drift"]


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2Jclears", "a\u202eb", " "], ids=repr)
def test_control_characters_are_refused_in_texts_that_are_kept(host: Host, text: str) -> None:
    user = host.subscriber()
    for arguments in (
        ("tokens", "grant", user, 5, "--reason", text, "--reference", "r"),
        ("tokens", "grant", user, 5, "--reason", "r", "--reference", text),
        ("tokens", "grant", user, 5, "--reason", "r", "--reference", "r", "--by", text),
        ("rollout", "set", "Chat", "off", "--note", text),
        ("rollout", "set", text, "off", "--note", "r"),
    ):
        trueup(*arguments, code=2)
    assert trueup_json("tokens", "grants", user)["grants"] == []
    assert trueup_json("rollout", "history")["changes"] == []


def test_a_full_disk_is_one_error() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([TRUEUP, "settings"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "the output can't be written" in done.stderr


def test_an_output_without_a_character_gets_a_replacement() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([TRUEUP, "--help"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([TRUEUP, "drift", "reprot–"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")
def test_a_result_is_shown_later_by_its_tasks_id(host: Host) -> None:
    said = trueup("result", "no-such-task", code=1).stderr
    assert "Task no-such-task has no result (state PENDING)" in said
    assert trueup_json("result", "no-such-task", code=1)["state"] == "PENDING"
    app = own_application()
    try:
        app.backend.store_result("done-task", {"pairs": 3}, "SUCCESS")
        app.backend.store_result("failed-task", ValueError("no page"), "FAILURE")
        assert trueup_json("result", "done-task")["result"] == {"pairs": 3}
        assert "the task failed (ValueError): no page" in trueup("result", "failed-task", code=1).stderr
    finally:
        close_connections(app)


def test_features_of_any_task_that_passed_the_gate_are_listed(host: Host) -> None:
    from tests.support.work import hold_tokens
    from trueup.database.engine import connect

    with connect() as connection:
        hold_tokens(connection, host.subscriber(), task="t")
    [feature] = host.execute("SELECT feature_name FROM trueup.hold").scalars()
    assert feature in [one["feature_name"] for one in trueup_json("rollout", "list")["features"]]


def test_a_grant_says_when_the_hosts_counter_shows_it(host: Host) -> None:
    user = host.subscriber()
    said = trueup("tokens", "grant", user, 5, "--reason", "r", "--reference", "r").stdout
    assert f"counter shows them after the next reconcile run (`trueup reconcile --user {user}`)" in said
