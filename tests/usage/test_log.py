from datetime import datetime, timedelta

import pytest
from sqlalchemy import Connection

from tests.support.host import START, Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.host.mapping import HostMapping
from trueup.usage.log import SECTIONS, list_usage

pytestmark = pytest.mark.dated


def test_rows_are_listed_newest_first_with_the_task_that_made_them(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    host.log(host.subscriber(), 999)
    host.log(user, 1, at=START - timedelta(days=9), success=False)
    charge_tokens(
        connection, hold_tokens(connection, user, task="t"), 300, now=START, metadata={"task_id": "t", "call": "1"}
    )
    rows = list_usage(connection, HostMapping(), user)
    assert [(row.total_tokens, row.success, row.task_id) for row in rows] == [(300, True, "t"), (1, False, None)]
    assert (rows[0].prompt_tokens, rows[0].completion_tokens, rows[0].model_name) == (150, 150, "test-model")
    assert (rows[0].created_at, rows[0].section) == (START, "chat")
    assert len(list_usage(connection, HostMapping(), user, limit=1)) == 1


def test_a_task_id_that_the_host_wrote_itself_is_not_taken_for_ours(host: Host, connection: Connection) -> None:
    user = host.subscriber()
    charge_tokens(connection, hold_tokens(connection, user, task="t"), 300, metadata={"task_id": "t"})
    row = host.log(user, 5)
    host.execute('UPDATE ai_usage_log SET metadata = \'{"task_id": "t"}\' WHERE id = :id', id=row)
    assert {(row.total_tokens, row.task_id) for row in list_usage(connection, HostMapping(), user)} == {
        (300, "t"),
        (5, None),
    }


@pytest.mark.parametrize("created_at", ["infinity", "-infinity", "12000-01-01", "4000-01-01 BC", None])
def test_odd_rows_are_listed_too(host: Host, connection: Connection, created_at: str | None) -> None:
    user = host.subscriber()
    for column in ("created_at", "total_tokens", "prompt_tokens", "success", "model_name", "metadata", "section"):
        host.execute(f"ALTER TABLE ai_usage_log ALTER {column} DROP NOT NULL")
    host.execute(
        "INSERT INTO ai_usage_log (user_id, created_at, total_tokens, prompt_tokens, success, model_name, metadata) "
        "VALUES (:user, CAST(:at AS timestamptz), NULL, NULL, NULL, NULL, NULL)",
        user=user,
        at=created_at,
    )
    (row,) = list_usage(connection, HostMapping(), user)
    assert isinstance(row.created_at, datetime)
    assert (row.total_tokens, row.prompt_tokens, row.success, row.model_name, row.section) == (0, 0, False, "", "")


def test_the_sections_fit_the_logs_column() -> None:
    assert max(map(len, SECTIONS)) <= 50
