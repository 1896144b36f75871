"""Tests of the harness: the checks see each kind of violation, which a test makes by hand."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import Connection

from tests.faults.by_hand import BUDGET, SENDING, SPENDING, serve
from tests.faults.ledger import EFFECTS, Ledger, Serving
from tests.faults.stages import Stage
from tests.faults.unrecorded import find_unrecorded
from tests.support.host import Host
from tests.support.work import usage_of
from trueup.gate.holds import Hold, expire_holds
from trueup.usage.charges import record_charge

MESSAGE = EFFECTS[0]
Found = Callable[[], set[str]]


def serve_stream(stage: Stage, billed: int, *, prompt: int, sent: int, chunks_read: int | None = None) -> Serving:
    """Serve a stream whose usage was never sent."""
    serving = serve(stage, billed)
    serving.streamed, serving.usage_sent, serving.complete = True, False, False
    serving.prompt_tokens, serving.tokens_sent, serving.chunks_read = prompt, sent, chunks_read
    return serving


def record(
    connection: Connection,
    hold: Hold,
    serving: Serving,
    *,
    tokens: int | None = None,
    key: str = "x:1",
    reported: bool = True,
) -> None:
    usage = usage_of(tokens or serving.billed, model_name=serving.model_name)
    metadata = {"task_id": hold.task_id, "usage_reported": reported}
    record_charge(connection, hold, call_key=key, usage=usage, metadata=metadata)


def post(stage: Stage, *, accepted: bool = True, text: str = "hello") -> None:
    posting, _ = stage.graph.ledger.open(effect=MESSAGE, comment_id=SENDING.comment_id, text=text, pid=1)
    posting.accepted, posting.ended_at = accepted, 0.0


def record_effect(host: Host, stage: Stage, status: str) -> None:
    """Record that state of the message in the outbox."""
    host.execute(
        "INSERT INTO trueup.outbox (user_id, task_id, effect, status, detail, created_at, updated_at) "
        """VALUES (:user, 'm1', :effect, :status, '{"message": "hello"}', now(), now())""",
        user=stage.users[0],
        effect=MESSAGE,
        status=status,
    )


def test_a_call_that_is_served_and_recorded_is_no_violation(
    stage: Stage, connection: Connection, hold: Hold, found: Found
) -> None:
    record(connection, hold, serve(stage, 50))
    assert found() == set()


def test_tokens_billed_beyond_the_request_are_no_overshoot(
    stage: Stage, connection: Connection, hold: Hold, found: Found
) -> None:
    record(connection, hold, serve(stage, BUDGET + 20, asked=80))
    assert found() == set()


def test_overshoot_is_found(stage: Stage, connection: Connection, hold: Hold, found: Found) -> None:
    record(connection, hold, serve(stage, BUDGET + 20, asked=BUDGET + 20))
    assert found() == {"overshoot"}


def test_overshoot_by_a_late_charge_is_distinguished(
    stage: Stage, connection: Connection, hold: Hold, found: Found
) -> None:
    expire_holds(connection, now=datetime.now(UTC) + timedelta(days=1))
    record(connection, hold, serve(stage, BUDGET + 20, asked=BUDGET + 20))
    assert found() == {"late_overshoot"}


def test_a_serving_recorded_twice_is_found(stage: Stage, connection: Connection, hold: Hold, found: Found) -> None:
    serving = serve(stage, 30)
    record(connection, hold, serving)
    record(connection, hold, serving, key="x:2")
    assert found() == {"double_charge"}


def test_a_wrong_figure_is_found(stage: Stage, connection: Connection, hold: Hold, found: Found) -> None:
    record(connection, hold, serve(stage, 50), tokens=49)
    assert found() == {"wrong_usage"}


def test_a_broken_stream_is_charged_for_the_text_that_arrived(
    stage: Stage, connection: Connection, hold: Hold, found: Found
) -> None:
    # 50 were generated: 10 more than were sent, and the caller does not know of them.
    record(connection, hold, serve_stream(stage, 50, prompt=30, sent=10), tokens=40, reported=False)
    assert found() == set()


@pytest.mark.parametrize("tokens", [39, 41, 50])
def test_a_wrong_charge_for_a_broken_stream_is_found(
    stage: Stage, connection: Connection, hold: Hold, found: Found, tokens: int
) -> None:
    record(connection, hold, serve_stream(stage, 50, prompt=30, sent=10), tokens=tokens, reported=False)
    assert found() == {"wrong_usage"}


@pytest.mark.parametrize(("tokens", "expected"), [(36, set()), (40, {"wrong_usage"})])
def test_a_closed_stream_is_charged_for_the_text_that_its_task_read(
    stage: Stage, connection: Connection, hold: Hold, found: Found, tokens: int, expected: set[str]
) -> None:
    serving = serve_stream(stage, 40, prompt=30, sent=10, chunks_read=3)
    serving.usage_sent = True
    record(connection, hold, serving, tokens=tokens, reported=False)
    assert found() == expected


@pytest.mark.parametrize("chunks_read", [None, 6])
def test_a_stream_read_to_its_end_is_charged_by_its_bill(
    stage: Stage, connection: Connection, hold: Hold, found: Found, chunks_read: int | None
) -> None:
    serving = serve_stream(stage, 77, prompt=30, sent=10, chunks_read=chunks_read)
    serving.usage_sent = True
    record(connection, hold, serving)
    assert found() == set()


def test_a_counted_charge_without_its_mark_is_found(
    stage: Stage, connection: Connection, hold: Hold, found: Found
) -> None:
    record(connection, hold, serve_stream(stage, 40, prompt=30, sent=10))
    assert found() == {"wrong_usage"}


@pytest.mark.parametrize(
    ("tokens", "stopped", "expected"),
    [(36, {1}, set()), (36, set(), {"wrong_usage"}), (29, {1}, {"wrong_usage"}), (41, {1}, {"wrong_usage"})],
)
def test_a_process_that_was_stopped_in_a_stream_may_charge_a_part_of_it(
    stage: Stage, connection: Connection, hold: Hold, found: Found, tokens: int, stopped: set[int], expected: set[str]
) -> None:
    serving = serve_stream(stage, 40, prompt=30, sent=10)
    serving.usage_sent, stage.stopped = True, stopped
    record(connection, hold, serving, tokens=tokens, reported=False)
    assert found() == expected


def test_usage_of_another_user_is_found(
    stage: Stage, host: Host, connection: Connection, hold: Hold, found: Found
) -> None:
    record(connection, hold, serve(stage, 50, user=host.subscriber(BUDGET)))
    assert found() == {"wrong_user"}


def test_a_lost_call_is_found(stage: Stage, hold: Hold, found: Found) -> None:
    serve(stage, 50)
    assert found() == {"lost_usage"}


def test_a_call_without_a_hold_is_found(stage: Stage, hold: Hold, found: Found) -> None:
    serve(stage, 0, task="t2")
    assert found() == {"unmetered_call"}


def test_a_leaked_hold_is_found(stage: Stage, host: Host, hold: Hold, found: Found) -> None:
    host.execute("UPDATE trueup.balance SET held = held + 7")
    assert found() == {"leaked_hold", "mismatched_balance"}


def test_a_balance_mismatch_is_found(stage: Stage, host: Host, hold: Hold, found: Found) -> None:
    host.execute("UPDATE trueup.balance SET consumed = consumed + 7")
    assert "mismatched_balance" in found()


def test_a_lost_task_is_found(stage: Stage, hold: Hold, found: Found) -> None:
    stage.outcomes = {"t1": "no result", "never-begun": "no result"}
    assert found() == {"lost_task"}


@pytest.mark.parametrize(("outcome", "expected"), [("waits for its retry", set()), ("unfinished", {"lost_task"})])
def test_only_a_message_in_transit_may_be_lost_when_redis_stops(
    stage: Stage, hold: Hold, found: Found, outcome: str, expected: set[str]
) -> None:
    stage.outcomes = {"t1": outcome}
    stage.note("redis_killed")
    assert found() == expected


def test_the_waiting_message_may_be_lost_when_redis_stops(stage: Stage, host: Host, hold: Hold, found: Found) -> None:
    host.execute("UPDATE trueup.hold SET duplicate_waits = 1")
    stage.outcomes = {"t1": "unfinished"}
    assert found() == {"lost_task"}
    stage.note("redis_killed")
    assert found() == set()


@pytest.mark.parametrize(("ways", "expected"), [(("stream",), {"lost_result"}), (("stream_closed",), set())])
def test_a_lost_result_is_found_unless_its_answers_were_not_kept(
    stage: Stage, host: Host, hold: Hold, found: Found, ways: tuple[str, ...], expected: set[str]
) -> None:
    host.execute("UPDATE trueup.hold SET completed = true")
    spending = replace(SPENDING, ways=ways)
    host.execute("UPDATE trueup.hold SET request = :request", request=spending.fingerprint(stage.users[0]))
    stage.plan = replace(stage.plan, tasks=(spending,))
    stage.outcomes = {"t1": "unfinished"}
    assert found() == expected


def test_a_retry_lost_while_redis_ran_is_found(stage: Stage, hold: Hold, found: Found) -> None:
    stage.outcomes = {"t1": "waits for its retry"}
    assert found() == {"lost_task"}


def test_messages_that_multiply_are_found(stage: Stage, found: Found) -> None:
    stage.settled, stage.messages_left = False, 2
    assert found() == {"message_flood"}


def extension(stage: Stage, *, granted: bool, added: int, attempt: int = 1) -> None:
    made = {"asked": 20, "granted": granted, "added": added, "attempt": attempt}
    stage.results["t1"] = {"spent": 0, "extensions": [made]}


@pytest.mark.parametrize(("granted", "added"), [(True, 20), (False, 0)])
def test_an_extension_by_the_requested_tokens_or_none_is_no_violation(
    stage: Stage, found: Found, granted: bool, added: int
) -> None:
    extension(stage, granted=granted, added=added)
    assert found() == set()


@pytest.mark.parametrize(("granted", "added"), [(True, 0), (True, 21), (False, 20)])
def test_an_extension_by_other_tokens_is_found(stage: Stage, found: Found, granted: bool, added: int) -> None:
    extension(stage, granted=granted, added=added)
    assert found() == {"wrong_extension"}


@pytest.mark.parametrize("status", ["sent", "unknown"])
def test_a_message_sent_once_and_recorded_is_no_violation(stage: Stage, host: Host, found: Found, status: str) -> None:
    post(stage, accepted=False)
    post(stage)
    record_effect(host, stage, status)
    assert found() == set()


def test_a_message_sent_twice_is_found(stage: Stage, host: Host, found: Found) -> None:
    post(stage)
    post(stage)
    record_effect(host, stage, "unknown")
    assert found() == {"message_sent_twice"}


@pytest.mark.parametrize("status", [None, "failed", "sending"])
def test_a_message_sent_without_a_record_is_found(stage: Stage, host: Host, found: Found, status: str | None) -> None:
    stage.outcomes = {"m1": "GraphError"}
    post(stage)
    if status:
        record_effect(host, stage, status)
    assert found() == {"message_untold"}


def test_a_message_of_a_flushed_task_may_remain_in_the_state_sending(stage: Stage, host: Host, found: Found) -> None:
    stage.outcomes, stage.flushed = {"m1": "no result"}, True
    post(stage)
    record_effect(host, stage, "sending")
    assert found() == set()


@pytest.mark.parametrize(("status", "expected"), [("sending", set()), ("failed", {"message_untold"})])
def test_a_message_of_a_killed_process_may_remain_in_the_state_sending(
    stage: Stage, host: Host, found: Found, status: str, expected: set[str]
) -> None:
    stage.outcomes, stage.killed = {"m1": "done"}, {1: 0.0}
    post(stage)
    record_effect(host, stage, status)
    assert found() == expected


def test_a_message_recorded_as_sent_that_was_not_sent_is_found(stage: Stage, host: Host, found: Found) -> None:
    post(stage, accepted=False)
    record_effect(host, stage, "sent")
    assert found() == {"message_not_sent"}


def test_a_message_that_differs_from_its_record_is_found(stage: Stage, host: Host, found: Found) -> None:
    post(stage, text="another")
    record_effect(host, stage, "sent")
    assert found() == {"message_not_sent"}


def test_a_result_that_claims_an_unsent_message_is_found(stage: Stage, host: Host, found: Found) -> None:
    stage.results["m1"] = {"status": "sent", "public_reply_sent": False}
    record_effect(host, stage, "failed")
    assert found() == {"message_not_sent"}


def test_a_task_lost_while_it_sent_is_found(stage: Stage, host: Host, found: Found) -> None:
    stage.outcomes = {"m1": "no result"}
    record_effect(host, stage, "sending")
    assert found() == {"lost_task"}


def intent(bound: int, outcome: str = "unknown") -> SimpleNamespace:
    return SimpleNamespace(user_id=7, task_id="t1", fingerprint="x", tokens_bound=bound, outcome=outcome)


@pytest.mark.parametrize(
    ("behaviour", "complete", "sent", "outcome", "lost"),
    [
        ("ok", True, 10, "started", True),
        ("ok", True, 10, "unknown", False),  # it may have waited too long
        ("ok", False, 10, "started", True),  # its task ended it early
        ("stream_broken", False, 2, "started", True),
        ("broken_after", False, 0, "started", False),
    ],
)
def test_an_answered_call_with_an_open_intent_is_lost_unless_its_process_died(
    behaviour: str, complete: bool, sent: int, outcome: str, lost: bool
) -> None:
    serving, _ = Ledger().open(task_id="t1", call=1, fingerprint="x", user_id=7, pid=1, asked=80)
    serving.billed, serving.behaviour, serving.complete = 40, behaviour, complete
    serving.streamed, serving.tokens_sent, serving.chunks_read = True, sent, 3
    for killed, expected in (({}, lost), ({1: serving.started_at + 1}, False)):
        [found] = find_unrecorded([serving], set(), [intent(80, outcome)], killed)
        assert found.lost is expected


def test_each_unrecorded_call_needs_its_own_row_with_a_sufficient_bound() -> None:
    ledger = Ledger()
    for billed in (40, 60):
        serving, _ = ledger.open(task_id="t1", call=1, fingerprint="x", user_id=7, pid=1, asked=80)
        serving.billed = billed
    servings = ledger.servings()

    def named(*bounds: int) -> list[bool | None]:
        return [call.named for call in find_unrecorded(servings, set(), map(intent, bounds), {})]

    assert named(40, 60) == [True, True]
    assert named(60) == [False, True]
    assert named(50, 50) == [True, False]
    assert named() == [False, False]


def test_a_later_death_does_not_excuse_an_earlier_call() -> None:
    ledger = Ledger()
    for call in (1, 2):
        serving, _ = ledger.open(task_id="t1", call=call, fingerprint=f"x{call}", user_id=7, pid=1, asked=80)
        serving.billed, serving.complete = 40, True
    servings = ledger.servings()
    killed = {1: servings[1].started_at + 1}
    causes = [call.cause for call in find_unrecorded(servings, set(), None, killed)]
    assert causes == ["none", "process killed"]


@pytest.mark.parametrize(
    ("run", "lane", "cause"),
    [(1, 1, "none"), (1, 2, "process killed"), (2, 2, "none")],
)
def test_a_death_excuses_a_call_in_a_thread_unless_its_thread_or_its_process_went_on(
    run: int, lane: int, cause: str
) -> None:
    ledger = Ledger()
    for call, (its_run, its_lane) in enumerate([(1, 1), (run, lane)], 1):
        serving, _ = ledger.open(
            task_id="t1", call=call, fingerprint=f"x{call}", user_id=7, pid=1, asked=80, run=its_run, lane=its_lane
        )
        serving.billed, serving.complete = 40, True
    servings = ledger.servings()
    killed = {1: servings[1].started_at + 1}
    causes = [call.cause for call in find_unrecorded(servings, set(), None, killed)]
    assert causes == [cause, "process killed"]
