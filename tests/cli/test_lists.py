"""`trueup holds list` and `trueup usage list`."""

from sqlalchemy import Connection

from tests.cli.conftest import trueup, trueup_json
from tests.support.host import Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.gate.holds import close_hold


def test_open_holds_are_listed_with_their_remaining_tokens(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    charge_tokens(connection, hold_tokens(connection, user, 1_000, task="one"), 300)
    [hold] = trueup_json("holds", "list")["holds"]
    assert (hold["user_id"], hold["task_id"], hold["status"]) == (user, "one", "open")
    assert (hold["tokens_reserved"], hold["tokens_charged"], hold["tokens_left"]) == (1_000, 300, 700)
    table = trueup("holds", "list").stdout
    for cell in ("one", "open", "1,000", "300", "700"):
        assert cell in table


def test_ended_holds_are_listed_only_when_asked_for(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    close_hold(connection, hold_tokens(connection, user, task="ended"))
    assert trueup("holds", "list").stdout == "No open holds.\n"
    assert trueup_json("holds", "list")["holds"] == []
    [hold] = trueup_json("holds", "list", "--all")["holds"]
    assert (hold["task_id"], hold["status"]) == ("ended", "released")


def test_without_any_hold_the_list_says_so(database: str) -> None:
    assert trueup("holds", "list", "--all").stdout == "No holds.\n"


def test_holds_of_one_user_leave_the_others_out(host: Host, connection: Connection) -> None:
    one, other = host.subscriber(), host.subscriber()
    for user in (one, other):
        hold_tokens(connection, user, task=f"of-{user}")
    assert [hold["task_id"] for hold in trueup_json("holds", "list", "--user", one)["holds"]] == [f"of-{one}"]
    assert len(trueup_json("holds", "list")["holds"]) == 2
    assert len(trueup_json("holds", "list", "--limit", 1)["holds"]) == 1


def test_the_lists_refuse_limits_and_users_that_are_none(database: str) -> None:
    for arguments in (("holds", "list", "--limit", 0), ("holds", "list", "--user", "x"), ("usage", "list", "x")):
        assert "Invalid value" in trueup(*arguments, code=2).stderr


def test_usage_shows_the_rows_of_the_host_and_of_tasks(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    host.log(user, 120)
    host.log(user, 70, success=False)
    charge_tokens(connection, hold_tokens(connection, user, task="one"), 300, metadata={"task_id": "one"})
    rows = trueup_json("usage", "list", user)["rows"]
    assert {(row["total_tokens"], row["success"], row["task_id"]) for row in rows} == {
        (120, True, None),
        (70, False, None),
        (300, True, "one"),
    }
    assert [row["created_at"] for row in rows] == sorted((row["created_at"] for row in rows), reverse=True)
    assert len(trueup_json("usage", "list", user, "--limit", 2)["rows"]) == 2
    table = trueup("usage", "list", user).stdout
    assert "one" in table
    assert "300" in table


def test_a_user_without_usage_is_reported(host: Host) -> None:
    user = host.subscriber()
    assert trueup("usage", "list", user).stdout == f"The log has no rows of user {user}.\n"
    assert trueup_json("usage", "list", user)["rows"] == []


def test_a_piped_table_is_not_cut(host: Host, connection: Connection) -> None:
    user, task = host.subscriber(), "0b7f6f0e-5f0a-4f6e-9f6e-0123456789ab"
    hold_tokens(connection, user, task=task)
    [line] = [line for line in trueup("holds", "list").stdout.splitlines() if task in line]
    assert "open" in line
