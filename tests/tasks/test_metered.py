import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, Signature
from celery.exceptions import Ignore
from sqlalchemy import Connection

from tests.support import model_tasks
from tests.support.host import Host
from tests.support.work import hold_tokens
from tests.support.worker import own_application
from trueup.billing.token_hold import ai_tokens
from trueup.errors import (
    HoldBusyError,
    HoldOvertakenError,
    InvalidInputError,
    NoHoldError,
    ServiceUnavailableError,
    TokensDenied,
)
from trueup.gate.holds import HoldRow, close_hold, list_holds
from trueup.llm.running import running_hold
from trueup.settings.settings import get_settings
from trueup.tasks import metered_task
from trueup.tasks.base import MAX_LOST_HOLDS
from trueup.tasks.metered import _model
from trueup.tasks.requeue import WAITS_HEADER, requeue


@pytest.fixture(autouse=True)
def _fresh_model_client(database: str) -> Iterator[None]:
    """Clear the model client, which is cached per process, because each test has its own settings."""
    _model.cache_clear()
    yield
    _model.cache_clear()


@pytest.fixture
def app(database: str) -> Celery:
    return own_application()


def request_of(task: Any, **arguments: Any) -> str:
    fingerprint: str = task.fingerprint(task.parser.parse((), arguments))
    return fingerprint


def holds_of(connection: Connection, user: int) -> list[HoldRow]:
    return list_holds(connection, user_id=user, every_status=True)


def test_a_task_spends_from_a_hold_and_releases_the_rest(app: Celery, host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    spent = model_tasks.spend.apply(kwargs={"user_id": user}).get()
    [hold] = holds_of(connection, user)
    assert (hold.status, hold.tokens_reserved, hold.tokens_charged) == ("settled", 100, spent)
    assert host.used(user) == spent > 0
    assert host.counter(user) == 1_000 - spent
    assert host.value("SELECT held FROM trueup.balance WHERE user_id = :user", user=user) == 0


def test_a_task_is_denied_before_any_work(app: Celery, host: Host, connection: Connection) -> None:
    user = host.subscriber(99)
    with pytest.raises(TokensDenied) as denied:
        model_tasks.spend.apply(kwargs={"user_id": user}).get()
    assert denied.value.payload == {
        "success": False,
        "error": "Insufficient tokens for Spender: 100 needed, 99 available",
        "error_code": "insufficient_tokens",
        "tokens_remaining": 99,
        "original_tokens": 99,
        "consumed_tokens": 0,
        "days_remaining": None,
    }
    assert holds_of(connection, user) == []
    assert host.used(user) == 0


@pytest.mark.parametrize("way", ["apply", "call", "map", "starmap", "chunks", "eager"])
def test_every_way_to_call_a_task_passes_the_gate(
    way: str, app: Celery, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, poor = host.subscriber(1_000), host.subscriber(10)
    task = model_tasks.spend
    monkeypatch.setitem(app.conf, "task_always_eager", way == "eager")

    def call(user_id: int) -> Any:
        ways = {
            "apply": lambda: task.apply(args=(user_id,)).get(),
            "call": lambda: task(user_id),
            "map": lambda: task.map([user_id]).apply().get(),
            "starmap": lambda: task.starmap([(user_id,)]).apply().get(),
            "chunks": lambda: task.chunks([(user_id,)], 1).group().apply().get(),
            "eager": lambda: task.delay(user_id).get(),
        }
        return ways[way]()

    call(user)
    assert host.used(user) > 0
    with pytest.raises(TokensDenied):
        call(poor)
    assert host.used(poor) == 0


def test_a_direct_call_of_run_cannot_spend(app: Celery, host: Host) -> None:
    user = host.subscriber(1_000)
    with pytest.raises(NoHoldError, match="outside a metered task"):
        model_tasks.spend.run(user_id=user)
    assert host.used(user) == 0


def test_a_failing_task_is_charged_for_its_usage(app: Celery, host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    with pytest.raises(RuntimeError, match="after spending"):
        model_tasks.fail.apply(kwargs={"user_id": user}).get()
    [hold] = holds_of(connection, user)
    assert hold.status == "settled"
    assert host.used(user) == hold.tokens_charged > 0


def test_an_ignored_task_releases_its_hold(app: Celery, host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    model_tasks.ignore.apply(kwargs={"user_id": user})
    [hold] = holds_of(connection, user)
    assert (hold.status, hold.tokens_left) == ("released", 0)


def test_a_task_may_call_another_directly_each_with_its_own_hold(
    app: Celery, host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    spent = model_tasks.outer.apply(kwargs={"user_id": user}).get()
    assert host.used(user) == sum(spent)
    assert {(hold.feature_name, hold.status) for hold in holds_of(connection, user)} == {
        ("Outer", "settled"),
        ("Spender", "settled"),
    }


def test_a_quick_retry_keeps_its_hold_and_spends_from_what_is_left(
    app: Celery, host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    with pytest.raises(ValueError, match="always"):
        model_tasks.retrying.apply(kwargs={"user_id": user}).get()
    [hold] = holds_of(connection, user)
    assert (hold.attempt, hold.status, hold.tokens_reserved) == (2, "settled", 100)
    assert host.used(user) == hold.tokens_charged > 0


def test_a_denied_task_is_never_retried(app: Celery, host: Host) -> None:
    poor = host.subscriber(10)
    result = model_tasks.retrying.apply(kwargs={"user_id": poor})
    assert isinstance(result.result, TokensDenied)
    assert result.state == "FAILURE"


def test_on_denied_return_makes_the_payload_the_result(app: Celery, host: Host) -> None:
    answer = model_tasks.answering.apply(kwargs={"user_id": host.user()}).get()
    assert (answer["success"], answer["error_code"]) == (False, "no_subscription")


def test_the_estimate_may_depend_on_the_arguments(app: Celery, host: Host) -> None:
    user = host.subscriber(1_000)
    assert model_tasks.measured.apply(kwargs={"user_id": user, "tokens": 321}).get() == 321


def test_a_call_without_an_estimate_is_not_gated_and_cannot_spend(app: Celery, host: Host) -> None:
    with pytest.raises(NoHoldError):
        model_tasks.measured.apply(kwargs={"user_id": host.user(), "tokens": None}).get()


def test_no_hold_is_active_after_a_task_has_ended(app: Celery, host: Host) -> None:
    model_tasks.spend.apply(kwargs={"user_id": host.subscriber(1_000)}).get()
    assert running_hold() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "missing a required argument: 'user_id'"),
        ({"user_id": 1, "wrods": 3}, "unexpected keyword argument 'wrods'"),
        ({"user_id": 1, "words": "many"}, "words: Input should be a valid integer"),
        ({"user_id": "someone"}, "user_id: 'someone' is no user id"),
        ({"user_id": True}, "user_id: True is no user id"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_held(
    arguments: dict[str, Any], message: str, app: Celery, host: Host
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        model_tasks.spend(**arguments)
    assert host.value("SELECT count(*) FROM trueup.hold") == 0


def test_without_a_database_the_task_does_not_run(app: Celery, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_DATABASE_URL", "postgresql://user@127.0.0.1:1/none")
    get_settings.cache_clear()
    with pytest.raises(ServiceUnavailableError, match=r"PostgreSQL at 127\.0\.0\.1:1/none does not answer"):
        model_tasks.spend(user_id=1)


def test_a_misspelt_option_fails_at_import_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match=r"no option 'max_retry'\. Did you mean max_retries\?"):
        metered_task(feature_name="F", section="chat", estimated_tokens=1, max_retry=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"section": ""}, "section: '' is no section. Give a text of 1 to 255 characters"),
        ({"estimated_tokens": -1}, "estimated_tokens: -1 is out of range"),
        ({"estimated_tokens": 1.5}, "estimated_tokens: 1.5 is no whole number"),
        ({"replay": "never"}, 'replay: \'never\' is not valid: use "redelivery" or "always"'),
        ({"on_denied": "skip"}, 'on_denied: \'skip\' is not valid: use "raise" or "return"'),
    ],
)
def test_a_malformed_option_fails_at_import(options: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"feature_name": "F", "section": "chat", "estimated_tokens": 1}
    with pytest.raises(ValueError, match=message):
        metered_task(**(good | options))


def test_a_body_without_user_id_fails_at_import() -> None:
    def body(model: Any, text: str) -> None: ...

    with pytest.raises(TypeError, match="must take `user_id`"):
        metered_task(feature_name="F", section="chat", estimated_tokens=1)(body)


def test_a_redelivered_task_reuses_its_hold_and_replays_its_paid_answers(
    app: Celery, host: Host, connection: Connection
) -> None:
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    first = model_tasks.spend.apply(kwargs={"user_id": user, "calls": 2}, task_id=task_id).get()
    again = model_tasks.spend.apply(kwargs={"user_id": user, "calls": 2}, task_id=task_id).get()
    assert first == again == host.used(user)
    assert host.value("SELECT count(*) FROM trueup.charge WHERE task_id = :id", id=task_id) == 2


def test_a_task_whose_hold_expired_returns_to_the_gate(app: Celery, host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    with pytest.raises(HoldOvertakenError):
        model_tasks.expiring.apply(kwargs={"user_id": user}).get()
    assert [hold.status for hold in holds_of(connection, user)] == ["expired"]
    assert host.used(user) > 0


@pytest.mark.parametrize("waited", [False, True])
def test_a_duplicate_is_dropped_if_another_one_waits_unless_it_has_waited_itself(
    app: Celery, host: Host, connection: Connection, waited: bool
) -> None:
    """A duplicate that has waited may be the one in whose favour the others were dropped."""
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    request = request_of(model_tasks.spend, user_id=user)
    hold_tokens(connection, user, 100, task=task_id, request=request, lease=60)
    with pytest.raises(HoldBusyError) as first:
        hold_tokens(connection, user, 100, task=task_id, request=request, lease=60)
    assert (first.value.redundant, first.value.waits) == (False, 1)
    headers = {WAITS_HEADER: 1} if waited else None
    result = model_tasks.spend.apply(kwargs={"user_id": user}, task_id=task_id, headers=headers)
    assert (result.state, type(result.result)) == (("FAILURE", HoldBusyError) if waited else ("IGNORED", Ignore))
    assert [hold.attempt for hold in holds_of(connection, user)] == [1]


def test_only_one_copy_of_a_waiting_message_keeps_waiting(app: Celery, host: Host, connection: Connection) -> None:
    """Redis redelivers a waiting message when a worker's clock is wrong. Without this, each copy would make another."""
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    request = request_of(model_tasks.spend, user_id=user)
    hold_tokens(connection, user, 100, task=task_id, request=request, lease=60)
    with pytest.raises(HoldBusyError) as first:
        hold_tokens(connection, user, 100, task=task_id, request=request, lease=60)
    call = {"kwargs": {"user_id": user}, "task_id": task_id, "headers": {WAITS_HEADER: first.value.waits}}
    states = [model_tasks.spend.apply(**call).state for _ in range(3)]
    assert states == ["FAILURE", "IGNORED", "IGNORED"]


def test_a_task_waits_for_a_block_of_another_task_however_many_tasks_wait_for_it(
    app: Celery, host: Host, connection: Connection
) -> None:
    """Each of them has work of its own. Dropped as a duplicate's message is, it would be lost."""
    user = host.subscriber(1_000)
    with ai_tokens(user, 50, key="upload"):
        results = [model_tasks.uploading.apply(kwargs={"user_id": user}) for _ in range(3)]
    assert [(result.state, type(result.result)) for result in results] == [("FAILURE", HoldBusyError)] * 3
    assert model_tasks.uploading.apply(kwargs={"user_id": user}).get() == "uploaded"


@pytest.mark.parametrize(
    ("goes_on", "library"),
    [(True, False), (True, True), (False, False)],
    ids=["continues", "by a library with errors of its own", "asks for a retry"],
)
def test_an_overtaken_attempt_leaves_the_hold_to_the_later_one_and_requeues_its_message(
    app: Celery, host: Host, connection: Connection, goes_on: bool, library: bool
) -> None:
    """Both attempts may have the same message. If the first acknowledged it, it would be lost should the second die."""
    user = host.subscriber(1_000)
    result = model_tasks.overtaken.apply(kwargs={"user_id": user, "goes_on": goes_on, "library": library})
    assert (result.state, result.result.requeue) == ("REJECTED", True)
    assert host.used(user) == 0
    assert [(hold.attempt, hold.status) for hold in holds_of(connection, user)] == [(2, "open")]


def test_attempts_that_ended_their_holds_themselves_do_not_count_as_lost(
    app: Celery, host: Host, connection: Connection
) -> None:
    """A task that waits for a server, or for another hold, opens and closes a hold each time."""
    user, task_id = host.subscriber(1_000), str(uuid.uuid4())
    request = request_of(model_tasks.expiring, user_id=user)
    for _ in range(MAX_LOST_HOLDS):
        close_hold(connection, hold_tokens(connection, user, 100, task=task_id, request=request))
    result = model_tasks.expiring.apply(kwargs={"user_id": user}, task_id=task_id)
    assert (result.state, type(result.result)) == ("FAILURE", HoldOvertakenError), "a worker requeues it"


def test_a_body_may_have_an_argument_named_task(app: Celery, host: Host) -> None:
    @metered_task(name="test.named", feature_name="Named", section="chat", estimated_tokens=1)
    def named(model: Any, user_id: int, task: str) -> str:
        return task

    assert named.apply(kwargs={"user_id": host.subscriber(), "task": "mine"}).get() == "mine"


def test_a_task_waits_less_than_the_visibility_timeout(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting message is not acknowledged. A redelivery meanwhile would double it with each wait."""
    monkeypatch.setenv("TRUEUP_VISIBILITY_TIMEOUT_SECONDS", "10")
    get_settings.cache_clear()
    sent: list[float] = []
    monkeypatch.setattr(Signature, "apply_async", lambda signature, *_: sent.append(signature.options["countdown"]))
    task = model_tasks.spend
    task.push_request(id=str(uuid.uuid4()), args=(), kwargs={"user_id": 1}, called_directly=False)
    try:
        for seconds in (3.0, 60.0):
            requeue(task, HoldBusyError("t", seconds, redundant=False), seconds)
    finally:
        task.pop_request()
    assert sent == [3.0, 5.0]
