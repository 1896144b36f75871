from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import QueuePool

from tests.support.host import START, Host
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

NOW = START + timedelta(days=3)


def begin(connection: Connection, *, user: int = 1, task: str = "t", effect: str = "dm", **more: Any) -> Effect:
    detail = more.pop("detail", {"text": "hello"})
    return begin_effect(connection, user_id=user, task_id=task, effect=effect, detail=detail, **more)


def found(connection: Connection) -> Effect:
    effect = find_effect(connection, user_id=1, task_id="t", effect="dm")
    assert effect is not None
    return effect


def test_an_effect_is_on_record_before_it_is_tried(connection: Connection) -> None:
    assert find_effect(connection, user_id=1, task_id="t", effect="dm") is None
    begun = begin(connection, now=NOW)
    assert (begun.status, begun.detail, begun.updated_at) == ("sending", {"text": "hello"}, NOW)
    assert found(connection) == begun


def test_what_an_attempt_left_in_the_middle_is_unknown_to_the_next_and_stays_so(connection: Connection) -> None:
    begin(connection)
    later = begin(connection, detail={"text": "other words"}, now=NOW)
    assert (later.status, later.detail, later.updated_at) == ("unknown", {"text": "hello"}, NOW)
    assert begin(connection).status == "unknown"


def test_what_was_sent_is_not_sent_again_and_its_answer_is_there(connection: Connection) -> None:
    finish_effect(connection, begin(connection), "sent", detail={"message_id": "m1"}, now=NOW)
    assert begin(connection, detail={"text": "other words"}).status == "sent"
    assert found(connection).detail == {"text": "hello", "message_id": "m1"}


def test_what_certainly_failed_is_tried_again_and_the_record_says_what_is_sent_now(connection: Connection) -> None:
    finish_effect(connection, begin(connection), "failed", detail={"error": "403"})
    again = begin(connection, detail={"text": "other words"})
    assert (again.status, again.detail) == ("sending", {"text": "other words"})
    assert found(connection).detail == {"text": "other words"}


def test_of_many_beginners_at_once_one_may_send(host: Host, connection: Connection, database: str) -> None:
    finish_effect(connection, begin(connection, task="failed before"), "failed")
    engine = create_engine(database, poolclass=QueuePool, pool_size=8, isolation_level="AUTOCOMMIT")

    def try_(task: str) -> EffectStatus:
        with engine.connect() as own:
            return begin(own, task=task).status

    for task in ("new", "failed before"):
        assert sorted(run_at_once([lambda task=task: try_(task)] * 8)) == ["sending"] + ["unknown"] * 7
    engine.dispose()


def test_users_tasks_and_effects_are_told_apart(connection: Connection) -> None:
    begin(connection)
    for other in ({"user": 2}, {"task": "t2"}, {"effect": "reply"}):
        assert begin(connection, **other).status == "sending"


def test_an_attempt_thought_dead_may_still_tell_how_it_ended(connection: Connection) -> None:
    slow = begin(connection)
    begin(connection)
    finish_effect(connection, slow, "sent")
    assert found(connection).status == "sent"


@pytest.mark.parametrize("status", ["failed", "unknown", "sending"])
def test_what_was_sent_stays_sent_whatever_a_slow_attempt_tells(connection: Connection, status: EffectStatus) -> None:
    """Else the next delivery would find it failed, and send it again."""
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


def test_an_effect_that_turns_out_to_be_sent_is_not_reopened(connection: Connection) -> None:
    slow = begin(connection)
    unknown = begin(connection)
    finish_effect(connection, slow, "sent", detail={"message_id": "m1"})
    reopened = reopen_effect(connection, unknown)
    assert (reopened.status, reopened.detail["message_id"]) == ("sent", "m1")
    assert found(connection).status == "sent"


def test_a_late_word_about_a_try_that_failed_does_not_count_for_the_next(connection: Connection) -> None:
    """Else a third delivery would take the message that is on its way for one that failed, and send it again."""
    first = begin(connection)
    finish_effect(connection, first, "failed")
    second = begin(connection)
    assert (second.status, second.tries) == ("sending", 2)
    finish_effect(connection, first, "failed")
    assert begin(connection).status == "unknown"
    finish_effect(connection, second, "failed")
    assert begin(connection).tries == 3


def test_what_nobody_can_tell_is_listed_newest_first(host: Host, connection: Connection) -> None:
    for minutes, task in ((2, "b"), (1, "a"), (3, "c")):
        finish_effect(connection, begin(connection, task=task), "unknown", now=NOW + timedelta(minutes=minutes))
    for status in ("sent", "failed"):
        finish_effect(connection, begin(connection, task=status), status)  # type: ignore[arg-type]
    assert [effect.task_id for effect in list_unresolved_effects(connection)] == ["c", "b", "a"]
    assert [effect.task_id for effect in list_unresolved_effects(connection, limit=2)] == ["c", "b"]


def test_what_was_being_done_when_its_task_was_over_is_unresolved_too(host: Host, connection: Connection) -> None:
    begin(connection, task="at work")
    begin(connection, task="left")
    host.execute("UPDATE trueup.outbox SET updated_at = updated_at - interval '10 minutes' WHERE task_id = 'left'")
    assert [effect.task_id for effect in list_unresolved_effects(connection)] == ["left"]
    assert read_status(connection).unknown_effects == 1
