from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import QueuePool

from tests.support.host import NOW, Host
from tests.support.sessions import run_at_once
from trueup.monitoring.status import read_status
from trueup.usage.outbox import (
    Effect,
    EffectStatus,
    begin_effect,
    find_effect,
    finish_effect,
    list_unresolved_effects,
    reopen_effect,
)

pytestmark = pytest.mark.dated


def begin(connection: Connection, *, user: int = 1, task: str = "t", effect: str = "dm", **more: Any) -> Effect:
    detail = more.pop("detail", {"text": "hello"})
    return begin_effect(connection, user_id=user, task_id=task, effect=effect, detail=detail, **more)


def found(connection: Connection) -> Effect:
    effect = find_effect(connection, user_id=1, task_id="t", effect="dm")
    assert effect is not None
    return effect


def test_an_effect_is_recorded_before_it_is_tried(connection: Connection) -> None:
    assert find_effect(connection, user_id=1, task_id="t", effect="dm") is None
    begun = begin(connection, now=NOW)
    assert (begun.status, begun.detail, begun.updated_at) == ("sending", {"text": "hello"}, NOW)
    assert found(connection) == begun


def test_an_interrupted_effect_is_unknown_to_later_attempts(connection: Connection) -> None:
    begin(connection)
    later = begin(connection, detail={"text": "other words"}, now=NOW)
    assert (later.status, later.detail, later.updated_at) == ("unknown", {"text": "hello"}, NOW)
    assert begin(connection).status == "unknown"


def test_a_sent_effect_is_not_sent_again_and_its_answer_is_stored(connection: Connection) -> None:
    finish_effect(connection, begin(connection), "sent", detail={"message_id": "m1"}, now=NOW)
    assert begin(connection, detail={"text": "other words"}).status == "sent"
    assert found(connection).detail == {"text": "hello", "message_id": "m1"}


def test_a_failed_effect_is_retried_and_its_record_has_the_new_request(connection: Connection) -> None:
    finish_effect(connection, begin(connection), "failed", detail={"error": "403"})
    again = begin(connection, detail={"text": "other words"})
    assert (again.status, again.detail) == ("sending", {"text": "other words"})
    assert found(connection).detail == {"text": "other words"}


def test_one_of_many_concurrent_attempts_may_send(host: Host, connection: Connection, database: str) -> None:
    finish_effect(connection, begin(connection, task="failed before"), "failed")
    engine = create_engine(database, poolclass=QueuePool, pool_size=8, isolation_level="AUTOCOMMIT")

    def try_(task: str) -> EffectStatus:
        with engine.connect() as own:
            return begin(own, task=task).status

    for task in ("new", "failed before"):
        assert sorted(run_at_once([lambda task=task: try_(task)] * 8)) == ["sending"] + ["unknown"] * 7
    engine.dispose()


def test_effects_are_separate_by_user_task_and_name(connection: Connection) -> None:
    begin(connection)
    for other in ({"user": 2}, {"task": "t2"}, {"effect": "reply"}):
        assert begin(connection, **other).status == "sending"


def test_an_attempt_that_seemed_dead_may_still_record_its_result(connection: Connection) -> None:
    slow = begin(connection)
    begin(connection)
    finish_effect(connection, slow, "sent")
    assert found(connection).status == "sent"


@pytest.mark.parametrize("status", ["failed", "unknown", "sending"])
def test_a_sent_effect_stays_sent_after_a_slow_attempts_report(connection: Connection, status: EffectStatus) -> None:
    """Otherwise the next delivery would read the status "failed" and send it again."""
    slow = begin(connection)
    finish_effect(connection, reopen_effect(connection, begin(connection)), "sent", detail={"message_id": "m2"})
    finish_effect(connection, slow, status, detail={"error": "timed out"})
    assert (found(connection).status, found(connection).detail["message_id"]) == ("sent", "m2")
    assert begin(connection).status == "sent"


def test_an_unknown_effect_is_reopened_for_one_more_try(connection: Connection) -> None:
    begin(connection)
    reopened = reopen_effect(connection, begin(connection))
    assert reopened.status == found(connection).status == "sending"
    assert begin(connection).status == "unknown"


def test_an_effect_that_was_sent_meanwhile_is_not_reopened(connection: Connection) -> None:
    slow = begin(connection)
    unknown = begin(connection)
    finish_effect(connection, slow, "sent", detail={"message_id": "m1"})
    reopened = reopen_effect(connection, unknown)
    assert (reopened.status, reopened.detail["message_id"]) == ("sent", "m1")
    assert found(connection).status == "sent"


def test_a_late_report_about_a_failed_try_does_not_change_the_next_try(connection: Connection) -> None:
    """Otherwise a third delivery would treat the message being sent as failed, and send it again."""
    first = begin(connection)
    finish_effect(connection, first, "failed")
    second = begin(connection)
    assert (second.status, second.tries) == ("sending", 2)
    finish_effect(connection, first, "failed")
    assert begin(connection).status == "unknown"
    finish_effect(connection, second, "failed")
    assert begin(connection).tries == 3


def test_unknown_effects_are_listed_newest_first(host: Host, connection: Connection) -> None:
    for minutes, task in ((2, "b"), (1, "a"), (3, "c")):
        finish_effect(connection, begin(connection, task=task), "unknown", now=NOW + timedelta(minutes=minutes))
    for status in ("sent", "failed"):
        finish_effect(connection, begin(connection, task=status), status)  # type: ignore[arg-type]
    assert [effect.task_id for effect in list_unresolved_effects(connection)] == ["c", "b", "a"]
    assert [effect.task_id for effect in list_unresolved_effects(connection, limit=2)] == ["c", "b"]


def test_an_effect_still_being_sent_after_its_tasks_time_limit_is_unresolved(
    host: Host, connection: Connection
) -> None:
    begin(connection, task="at work")
    begin(connection, task="left")
    host.execute("UPDATE trueup.outbox SET updated_at = updated_at - interval '10 minutes' WHERE task_id = 'left'")
    assert [effect.task_id for effect in list_unresolved_effects(connection)] == ["left"]
    assert read_status(connection).unknown_effects == 1
