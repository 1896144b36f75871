"""Permanent errors of the database: missing rights, changed tables of the host."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import trueup
from tests.support.host import Host

ROLE = "trueup_reader"
COMMANDS = [
    ("reconcile",),
    ("reconcile", "--dry-run"),
    ("reconcile", "--deep", "--jobs", 2),
    ("drift", "report"),
    ("drift", "history"),
    ("drift", "explain", 1),
    ("drift", "review"),
    ("drift", "accept", 1, "--note", "n"),
    ("drift", "undo", 1, "--note", "n"),
    ("tokens", "show", 1),
]


@pytest.fixture
def without_rights(host: Host, database: str, settings: Callable[..., None]) -> Iterator[None]:
    host.execute(f"CREATE ROLE {ROLE}")
    settings(TRUEUP_DATABASE_URL=f"{database}{'&' if '?' in database else '?'}options=-c%20role%3D{ROLE}")
    yield
    host.execute(f"DROP ROLE {ROLE}")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(map(str, command)))
def test_a_right_that_is_missing_is_named_with_the_remedy(without_rights: None, command: tuple[object, ...]) -> None:
    error = trueup(*command, code=1).stderr
    assert "refused: permission denied for schema trueup" in error
    assert "Grant it to trueup's role" in error
    assert "SELECT" not in error


CHANGES = {
    "a column renamed": "ALTER TABLE billing_subscription RENAME tokens_remaining TO tokens_left",
    "a table gone": "ALTER TABLE billing_subscription RENAME TO subscriptions",
    "a column of another type": "ALTER TABLE billing_subscription ALTER tokens_remaining TYPE text",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=" ".join)
def test_a_changed_table_of_the_host_is_reported(host: Host, change: str, more: tuple[str, ...]) -> None:
    host.log(host.subscriber(1_000), 300)
    host.execute(CHANGES[change])
    error = trueup("reconcile", *more, code=1).stderr
    assert "[host]" in error
    assert "trueup db init" in error
    assert "SELECT" not in error


def test_an_error_of_our_own_is_not_taken_for_the_database_s(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_values: object, **_more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("trueup.cli.drift.commands.read_history", broken)
    with pytest.raises(ZeroDivisionError):
        trueup("drift", "history")


LISTS = [("usage", "list", 1), ("holds", "list"), ("alerts", "list"), ("rollout", "list")]
READERS = [*COMMANDS, *LISTS, ("db", "grants")]


@pytest.mark.parametrize("command", READERS, ids=lambda command: " ".join(map(str, command)))
def test_a_command_that_reads_creates_no_database(
    command: tuple[object, ...], settings: Callable[..., None], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    settings(TRUEUP_HOME=str(home), TRUEUP_DATABASE_URL=None, TRUEUP_BROKER_URL="redis://127.0.0.1:1/0")
    error = trueup(*command, code=1).stderr
    assert str(home) in error
    assert "Set TRUEUP_DATABASE_URL" in error
    assert not (home / "postgres").exists()
