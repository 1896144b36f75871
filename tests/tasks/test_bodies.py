"""The shapes of a task's body: what is refused at import, what fails at run, and how `async def` runs."""

import asyncio
import functools
import os
import signal
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery
from sqlalchemy import Connection

from tests.hosts.documents import ROOT, run
from tests.support import async_tasks, model_tasks
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.worker import own_application
from trueup.gate.holds import list_holds
from trueup.llm.model import Message
from trueup.tasks import metered_task
from trueup.tasks.event_loop import run_async
from trueup.tasks.metered import _model

if TYPE_CHECKING:
    from trueup import AsyncModel, Model

    class ForCheckersOnly: ...


@pytest.fixture
def app(database: str) -> Iterator[Celery]:
    _model.cache_clear()
    yield own_application()
    _model.cache_clear()


def made(body: Any, **options: Any) -> Any:
    return metered_task(feature_name="F", section="chat", estimated_tokens=100, **options)(body)


def statuses(connection: Connection, user: int) -> list[tuple[str, int]]:
    rows = list_holds(connection, user_id=user, every_status=True)
    return [(row.status, row.tokens_left) for row in rows]


def generator(model: Any, user_id: int) -> Iterator[int]:
    yield 1


async def asynchronous_generator(model: Any, user_id: int) -> AsyncIterator[int]:
    yield 1


class Callables:
    def __call__(self, model: Any, user_id: int) -> str:
        return f"user {user_id}"


class AsyncCallables:
    async def __call__(self, model: Any, user_id: int) -> str:
        await asyncio.sleep(0)
        return f"user {user_id}"


class GeneratorCallables:
    def __call__(self, model: Any, user_id: int) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    "body",
    [
        generator,
        asynchronous_generator,
        functools.partial(generator),
        functools.partial(functools.partial(asynchronous_generator)),
        GeneratorCallables(),
    ],
)
def test_a_generator_body_is_refused_at_import(body: Any) -> None:
    with pytest.raises(TypeError, match="is a generator function"):
        made(body, name="test.generator")


@pytest.mark.parametrize("body", [Callables, "a text", None, staticmethod])
def test_a_body_that_is_not_a_function_is_refused_at_import(body: Any) -> None:
    with pytest.raises(TypeError, match="is not a function"):
        made(body)


@pytest.mark.parametrize("body", [functools.partial(model_tasks.ask), Callables()])
def test_a_body_without_a_name_of_its_own_needs_one(body: Any) -> None:
    with pytest.raises(TypeError, match=r"has no name for the task\. Give the option name="):
        made(body)


def with_prefix(model: Any, prefix: str, user_id: int) -> str:
    return f"{prefix} {user_id}"


async def with_prefix_later(model: Any, prefix: str, user_id: int) -> str:
    await asyncio.sleep(0)
    return f"{prefix} {user_id}"


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("callable", Callables()),
        ("async callable", AsyncCallables()),
        ("method", Callables().__call__),
        ("partial", functools.partial(with_prefix, prefix="user")),
        ("async partial", functools.partial(with_prefix_later, prefix="user")),
    ],
)
def test_every_callable_that_runs_may_be_a_body(name: str, body: Any, app: Celery, host: Host) -> None:
    user = host.subscriber(1_000)
    task = made(body, name=f"test.shape {name}")
    assert task.apply(kwargs={"user_id": user}).get() == f"user {user}"
    assert_true(host)


def lazily(model: Any, user_id: int) -> Any:
    return (model_tasks.ask(model, words) for words in (10, 20))


def not_awaiting(model: Any, user_id: int) -> Any:
    return with_prefix_later(model, "user", user_id)


def half(model: Any, user_id: int) -> Any:
    model_tasks.ask(model, 10)
    return map(str, [1])


async def asynchronously_half(model: Any, user_id: int) -> Any:
    await async_tasks.ask(model, 10)
    return asynchronous_generator(model, user_id)


@pytest.mark.parametrize("way", ["apply", "call"])
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (lazily, "generator", "released"),
        (not_awaiting, "coroutine", "released"),
        (half, "map", "settled"),
        (asynchronously_half, "async_generator", "settled"),
    ],
)
def test_a_body_that_returns_work_that_has_not_run_fails(
    way: str, body: Callable[..., Any], kind: str, status: str, app: Celery, host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    task = made(body, name=f"test.{body.__name__} by {way}", autoretry_for=(Exception,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=f"returned '{kind}', an object whose work has not run"):
            task(user) if way == "call" else task.apply(kwargs={"user_id": user}).get()
    assert statuses(connection, user) == [(status, 0)]
    assert host.value("SELECT bool_or(completed) FROM trueup.hold") is False


@pytest.mark.parametrize("way", ["apply", "call", "map"])
def test_an_async_body_spends_from_its_hold_and_releases_the_rest(
    way: str, app: Celery, host: Host, connection: Connection
) -> None:
    user, task = host.subscriber(1_000), async_tasks.async_spend
    ways: dict[str, Callable[[], Any]] = {
        "apply": lambda: task.apply(kwargs={"user_id": user, "calls": 8}).get(),
        "call": lambda: task(user, calls=8),
        "map": lambda: task.map([user]).apply().get()[0],
    }
    done = ways[way]()
    assert done["spent"] == host.used(user) > 0
    [(seen_hold, seen_task), in_a_child] = done["seen"]
    assert seen_hold == seen_task == connection.exec_driver_sql("SELECT task_id FROM trueup.hold").scalar_one()
    assert in_a_child == [seen_hold, seen_task]
    assert statuses(connection, user) == [("settled", 0)]
    assert_true(host)


def test_all_async_bodies_of_a_process_share_one_event_loop(app: Celery, host: Host) -> None:
    user = host.subscriber(5_000)
    assert len({async_tasks.async_spend(user)["loop"] for _ in range(3)}) == 1


def test_an_asyncio_application_may_run_a_task_eagerly(app: Celery, host: Host) -> None:
    user = host.subscriber(1_000)

    async def view() -> Any:
        return async_tasks.async_spend.apply(kwargs={"user_id": user}).get()

    assert asyncio.run(view())["spent"] == host.used(user)


def test_an_async_body_may_call_other_tasks_directly_each_with_its_own_hold(
    app: Celery, host: Host, connection: Connection
) -> None:
    user, task_id = host.subscriber(5_000), "outer-1"
    spent = async_tasks.async_outer.apply(kwargs={"user_id": user}, task_id=task_id).get()
    assert sum(spent) == host.used(user)
    assert statuses(connection, user) == [("settled", 0)] * 3
    assert async_tasks.async_outer.apply(kwargs={"user_id": user}, task_id=task_id).get() == spent
    assert host.used(user) == sum(spent)
    assert_true(host)


def test_an_exception_that_interrupts_the_task_cancels_its_body_and_is_raised_when_it_has_ended(app: Celery) -> None:
    ended = []

    async def body() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("body")

    with pytest.raises(SoftTimeLimitExceeded):
        interrupted_after(0.2, lambda: run_async(body(), async_tasks.async_spend))
    assert ended == ["body"]


def interrupted_after(seconds: float, work: Callable[[], Any]) -> Any:
    """Raise in this thread as a soft time limit does: in a signal's handler."""

    def interrupt(*_: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_tasks_that_an_async_body_leaves_are_cancelled_before_its_hold_ends(app: Celery, host: Host) -> None:
    user, left = host.subscriber(5_000), []

    @metered_task(name="test.leaving", feature_name="Leaving", section="chat", estimated_tokens=500)
    async def leaving(model: "AsyncModel", user_id: int) -> None:
        async def later() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                left.append("cancelled")

        asyncio.create_task(later()).add_done_callback(lambda _: None)
        asyncio.create_task(later()).cancel()
        await asyncio.sleep(0)

    leaving(user)
    assert left == ["cancelled"]


def test_a_call_whose_caller_gave_up_is_charged_before_the_hold_ends(
    app: Celery, host: Host, connection: Connection
) -> None:
    """The provider was asked and will be paid, so the tokens must not go back to the budget before the charge."""
    user, slow = host.subscriber(5_000), _model(os.getpid()).provider
    complete, answered = slow.complete, []

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        answered.append(1)
        return complete(*args, **kwargs)

    slow.complete = slowly  # type: ignore[method-assign]

    @metered_task(name="test.impatient", feature_name="Impatient", section="chat", estimated_tokens=500)
    async def impatient(model: "AsyncModel", user_id: int) -> str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(async_tasks.ask(model, 10), 0.05)
        assert answered == []
        return "gave up"

    assert impatient(user) == "gave up"
    assert host.used(user) > 0
    assert host.value("SELECT bool_or(late) FROM trueup.charge") is False
    assert statuses(connection, user) == [("settled", 0)]


def test_an_async_body_streams_and_extends(app: Celery, host: Host) -> None:
    @metered_task(name="test.streaming", feature_name="Streaming", section="chat", estimated_tokens=100)
    async def streaming(model: "AsyncModel", user_id: int) -> list[Any]:
        extended = [await model.aextend(400), await model.aextend(10_000)]
        prompt = [Message(role="user", content="Orders are sent in two days. Returns are free.")]
        whole = [chunk async for chunk in model.astream(prompt)]
        async with model.astream([Message(role="user", content="Another question, which is longer.")]) as stream:
            async for _ in stream:
                break
        left_open = model.astream([Message(role="user", content="A third one.")])
        await anext(aiter(left_open))
        return [extended, len(whole) > 1, (await stream.acompletion()).completion_tokens]

    user = host.subscriber(1_000)
    assert streaming(user) == [[True, False], True, 1]
    assert host.value("SELECT count(*) FROM trueup.charge") == 3
    assert host.value("SELECT count(*) FROM trueup.call_intent") == 0
    assert_true(host)


def test_hints_of_what_the_caller_does_not_pass_may_be_for_type_checkers_only(app: Celery, host: Host) -> None:
    @metered_task(name="test.hinted", feature_name="Hinted", section="chat", estimated_tokens=100)
    def hinted(model: "Model", user_id: "ForCheckersOnly", words: "int") -> "ForCheckersOnly":
        return words * 2  # type: ignore[return-value]

    assert hinted(host.subscriber(), words="4") == 8


@pytest.mark.parametrize("hint", ["ForCheckersOnly", "list[Missing]", "not valid", "1 / 0"])
def test_a_hint_that_cannot_be_resolved_fails_at_import_and_names_parameter_and_hint(hint: str) -> None:
    def body(model: Any, user_id: int, text: Any) -> None: ...

    body.__annotations__["text"] = hint
    with pytest.raises(TypeError, match=rf"body: the type hint .*{hint.split('[')[0]}.* of parameter `text` can't be"):
        made(body)


@pytest.mark.parametrize("propagates", [True, False])
def test_an_eager_retry_leaves_nothing_held(
    propagates: bool, app: Celery, host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(app.conf, "task_always_eager", True)
    monkeypatch.setitem(app.conf, "task_eager_propagates", propagates)
    user = host.subscriber(1_000)
    with pytest.raises(Exception, match=r"always|Retry"):
        model_tasks.retrying.delay(user_id=user).get()
    assert {left for _, left in statuses(connection, user)} == {0}
    assert host.value("SELECT held FROM trueup.balance") == 0
    assert_true(host)


def test_the_manuals_async_body_runs(app: Celery, host: Host) -> None:
    user = host.subscriber(10_000)
    digest = run(ROOT / "docs" / "python.md", "Async bodies")["digest"]
    assert len(digest(user, texts=["Orders are sent in two days.", "Returns are free."])) == 2
    assert host.value("SELECT count(*) FROM trueup.charge") == 2
