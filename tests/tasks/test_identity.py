"""What makes two deliveries one task: its id, the fingerprint of its request, the retries that ask for new answers."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from celery import Celery, Task
from pydantic import BaseModel
from sqlalchemy import Connection

from tests.support import model_tasks
from tests.support.host import Host
from tests.support.work import hold_tokens
from tests.support.worker import own_application
from trueup.errors import HoldBusyError, ResultNotKeptError, TaskIdReusedError
from trueup.gate.holds import close_hold, list_holds
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message
from trueup.llm.providers.offline import offline_provider
from trueup.llm.running import spending_from
from trueup.settings.settings import get_settings
from trueup.tasks.arguments import ArgumentParser
from trueup.tasks.identity import canonical_defaults, request_fingerprint
from trueup.tasks.metered import _model

PROMPT = [Message(role="user", content="a question")]


@pytest.fixture(autouse=True)
def _fresh_model_client(database: str) -> Iterator[None]:
    """Clear the model client, which is cached per process, because each test has its own settings."""
    _model.cache_clear()
    yield
    _model.cache_clear()


@pytest.fixture
def app(database: str) -> Celery:
    return own_application()


def charges(host: Host) -> int:
    count: int = host.value("SELECT count(*) FROM trueup.charge")
    return count


def test_a_finished_tasks_id_with_other_arguments_is_a_task_of_its_own(app: Celery, host: Host) -> None:
    user = host.subscriber(1_000)
    results = [
        model_tasks.spend.apply(kwargs={"user_id": user, "words": words}, task_id="digest-42").get()
        for words in (10, 30, 10)
    ]
    assert results[0] == results[2] < results[1]
    assert host.used(user) == results[0] + results[1], "the third is a redelivery of the first"


def test_the_same_prompt_in_another_request_with_the_id_is_bought(app: Celery, host: Host) -> None:
    user = host.subscriber(1_000)
    one = model_tasks.spend.apply(kwargs={"user_id": user, "calls": 1}, task_id="digest-42").get()
    model_tasks.spend.apply(kwargs={"user_id": user, "calls": 2}, task_id="digest-42").get()
    assert host.used(user) > 2 * one
    assert charges(host) == 3


@pytest.mark.parametrize("other", ["arguments", "name"])
def test_an_id_that_another_request_uses_now_is_refused(
    other: str, app: Celery, host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    hold_tokens(connection, user, 100, task="digest-42", request="another", lease=60)
    task = model_tasks.spend if other == "arguments" else model_tasks.picky
    kwargs = {"user_id": user} if other == "arguments" else {"user_id": user, "good_at": 0}
    result = task.apply(kwargs=kwargs, task_id="digest-42")
    assert (result.state, type(result.result)) == ("FAILURE", TaskIdReusedError)
    assert "digest-42 is in use" in str(result.result)
    assert [hold.attempt for hold in list_holds(connection, user_id=user, every_status=True)] == [1]
    assert host.used(user) == 0


def test_an_id_that_another_users_task_has_is_refused_until_that_has_ended(
    app: Celery, host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    other = hold_tokens(connection, host.subscriber(1_000), 100, task="digest-42", request="another", lease=60)
    with pytest.raises(TaskIdReusedError):
        model_tasks.spend.apply(kwargs={"user_id": user}, task_id="digest-42").get()
    assert host.value("SELECT count(*) FROM trueup.hold WHERE user_id = :user", user=user) == 0
    close_hold(connection, other)
    assert model_tasks.spend.apply(kwargs={"user_id": user}, task_id="digest-42").get() == host.used(user)


def test_users_may_have_the_same_key_for_their_blocks(host: Host, connection: Connection) -> None:
    for _ in range(2):
        hold_tokens(connection, host.subscriber(1_000), 100, task="request:upload", lease=60)


def test_a_copy_of_finished_work_does_not_disturb_the_request_that_has_its_id_now(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    close_hold(connection, hold_tokens(connection, user, task="t", request="first"), completed=True)
    hold_tokens(connection, user, task="t", request="second", lease=60)
    with pytest.raises(HoldBusyError) as busy:
        hold_tokens(connection, user, task="t", request="first")
    assert busy.value.redundant


def test_an_attempts_number_is_not_given_again_to_another_request(host: Host, connection: Connection) -> None:
    """A frozen attempt of the first request would else spend from the second one's hold."""
    user = host.subscriber(5_000)
    first = hold_tokens(connection, user, task="t", request="first")
    close_hold(connection, first)
    second = hold_tokens(connection, user, task="t", request="second")
    assert (first.attempt, second.attempt, second.follows) == (1, 2, True)


def test_a_retry_with_other_arguments_is_the_same_task(app: Celery, host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    model_tasks.changing.apply(kwargs={"user_id": user, "words": 12}, task_id="shrinking").get()
    [hold] = list_holds(connection, user_id=user, every_status=True)
    assert (hold.attempt, hold.status) == (3, "settled")
    assert charges(host) == 3


@pytest.mark.parametrize(("task", "bought"), [(model_tasks.picky, 3), (model_tasks.replaying, 1)])
def test_a_retry_for_a_rejected_answer_buys_afresh_unless_always_replayed(
    task: Task, bought: int, app: Celery, host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    spent = task.apply(kwargs={"user_id": user, "good_at": 2}).get()
    assert host.used(user) == spent * bought
    [hold] = list_holds(connection, user_id=user, every_status=True)
    assert (hold.status, hold.tokens_reserved) == ("settled", 200), "all tries spend from one hold"


def test_a_retry_of_a_failed_provider_call_replays_the_calls_before_it(app: Celery, host: Host) -> None:
    user = host.subscriber(1_000)
    assert model_tasks.failing_call.apply(kwargs={"user_id": user}).get() == host.used(user)
    assert charges(host) == 2


@pytest.mark.parametrize("message", ["the retry's", "the first one's"])
def test_a_crash_after_a_fresh_retry_replays_that_retrys_calls(
    message: str, host: Host, connection: Connection
) -> None:
    """The first message may be delivered again too, if its worker died before it acknowledged it."""
    user, client = host.subscriber(1_000), MeteredModel(offline_provider)
    for fresh in (0, 1):
        hold = hold_tokens(connection, user, 500, task="t", request="r", retries=fresh, fresh_retries=fresh)
        with spending_from(hold):
            client.complete(PROMPT, max_completion_tokens=20)
    host.execute("UPDATE trueup.hold SET lease_until = '-infinity'")
    used, fresh = host.used(user), 1 if message == "the retry's" else 0
    with spending_from(hold_tokens(connection, user, 500, task="t", request="r", retries=fresh, fresh_retries=fresh)):
        client.complete(PROMPT, max_completion_tokens=20)
    assert host.used(user) == used
    assert charges(host) == 2


def test_direct_calls_from_threads_are_replayed_whatever_thread_comes_first(app: Celery, host: Host) -> None:
    user, id_ = host.subscriber(5_000), str(uuid.uuid4())
    words = [10, 12, 14, 16, 10]
    first = model_tasks.calling.apply(kwargs={"user_id": user, "words": words}, task_id=id_).get()
    used = host.used(user)
    for _ in range(3):
        assert model_tasks.calling.apply(kwargs={"user_id": user, "words": words}, task_id=id_).get() == first
    assert host.used(user) == used == sum(first)


def test_finished_work_whose_answers_are_not_kept_fails_clearly(
    app: Celery, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_STORE_ANSWERS", "false")
    get_settings.cache_clear()
    user = host.subscriber(1_000)
    model_tasks.spend.apply(kwargs={"user_id": user}, task_id="t").get()
    with pytest.raises(ResultNotKeptError, match="Nothing was spent"):
        model_tasks.spend.apply(kwargs={"user_id": user}, task_id="t").get()
    assert charges(host) == 1


class Section(BaseModel):
    tags: set[str]


@dataclass
class Place:
    town: str


def fingerprint(*args: Any, body: Any = None, **kwargs: Any) -> str:
    def summarize(model: Any, user_id: int, sections: list[Section] = [], words: int = 10) -> None: ...  # noqa: B006

    parser = ArgumentParser(body or summarize, given=1)
    return request_fingerprint("shop.summarize", parser.parse(args, kwargs), canonical_defaults(parser.defaults))


def test_a_request_has_one_fingerprint_however_it_is_written(database: str) -> None:
    first = fingerprint(7, [{"tags": ["b", "a"]}])
    assert fingerprint(user_id="7", sections=[{"tags": ["a", "b"]}], words=10) == first
    assert fingerprint(8, [{"tags": ["b", "a"]}]) != first
    assert fingerprint(7, [{"tags": ["b"]}]) != first
    assert fingerprint(7, [{"tags": ["b", "a"]}], 11) != first


def test_a_release_that_adds_a_parameter_changes_no_fingerprint(database: str) -> None:
    def summarize(model: Any, user_id: int, tone: str = "kind", place: Place = Place("Rome")) -> None: ...  # noqa: B008

    assert fingerprint(7, body=summarize) == fingerprint(7)
