"""Acceptance: a real worker process, real PostgreSQL, real Redis."""

import threading
from collections import Counter
from pathlib import Path

import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from celery import Celery, Task, chain
from celery.exceptions import TimeoutError as ResultTimeoutError
from celery.exceptions import WorkerLostError
from celery.result import AsyncResult
from sqlalchemy import Engine, text

from tests.support import model_tasks
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import WorkerProcess
from trueup.billing.utils import check_ai_access_for_user
from trueup.errors import TokensDenied
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.tasks.requests import CELERY_RETRIES_LOST_TASKS

ARTICLE = Path(__file__).parents[2] / "examples" / "help_en.txt"


def test_a_task_runs_end_to_end_and_its_usage_lands_in_the_log(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(10_000)
    arguments = {"user_id": user, "text": ARTICLE.read_text(), "page_title": "Help", "max_pairs": 3}
    answer = app.tasks["trueup.generate_qa"].apply_async(kwargs=arguments).get(timeout=DEADLINE_SECONDS)
    assert len(answer["pairs"]) == 3
    row = shared_host.execute(
        "SELECT section, model_name, total_tokens, success FROM ai_usage_log WHERE user_id = :user", user=user
    ).one()
    assert (row.section, row.model_name, row.success) == ("knowledge_qa", "trueup-offline-1", True)
    assert shared_host.counter(user) == 10_000 - row.total_tokens


def test_rows_that_the_host_inserts_count_at_the_very_next_check(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    model_tasks.spend.delay(user_id=user).get(timeout=DEADLINE_SECONDS)
    shared_host.log(user, 1_000 - shared_host.used(user) - 99)
    assert check_ai_access_for_user(user, 99, "Spender")["has_access"]
    assert check_ai_access_for_user(user, 100, "Spender")["reason"] == "insufficient_tokens"
    with pytest.raises(TokensDenied):
        model_tasks.spend.delay(user_id=user).get(timeout=DEADLINE_SECONDS)


def test_of_200_tasks_with_budget_for_50_exactly_50_run(app: Celery, worker: WorkerProcess, shared_host: Host) -> None:
    cost = model_tasks.spend.delay(user_id=shared_host.subscriber(1_000)).get(timeout=DEADLINE_SECONDS)
    budget = 50 * cost
    user = shared_host.subscriber(budget)
    with sampled_usage(shared_host.engine, user) as samples:
        results = [model_tasks.exact.delay(user_id=user, tokens=cost) for _ in range(200)]
        outcomes = Counter(outcome(result) for result in results)
    assert outcomes.pop(cost) == 50
    assert set(outcomes) <= {"insufficient_tokens", "no_tokens_remaining"}
    assert outcomes.total() == 150
    assert shared_host.used(user) == budget
    assert len(samples) > 20
    assert max(used for used, _ in samples) <= budget
    assert max(promised for _, promised in samples) <= budget
    assert not held(shared_host, user)


def held(host: Host, user: int) -> int:
    tokens: int = host.value("SELECT held FROM trueup.balance WHERE user_id = :user", user=user)
    return tokens


def outcome(result: AsyncResult) -> int | str:
    try:
        tokens: int = result.get(timeout=DEADLINE_SECONDS)
    except TokensDenied as denied:
        return denied.error_code
    return tokens


class sampled_usage:  # noqa: N801 - used like a function
    """Sample the user's logged tokens, and consumed plus held, while the block runs."""

    def __init__(self, engine: Engine, user: int) -> None:
        self.samples: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(engine, user))

    def __enter__(self) -> list[tuple[int, int]]:
        self._thread.start()
        return self.samples

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self, engine: Engine, user: int) -> None:
        statement = text(
            "SELECT (SELECT coalesce(sum(total_tokens), 0) FROM ai_usage_log WHERE user_id = :user), "
            "(SELECT consumed + held FROM trueup.accounts(now()) WHERE user_id = :user)"
        )
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not self._stop.is_set():
                self.samples.append(tuple(connection.execute(statement, {"user": user}).one()))


def test_a_killed_pool_process_costs_no_tokens_twice(app: Celery, worker: WorkerProcess, shared_host: Host) -> None:
    user = shared_host.subscriber(1_000)
    result = model_tasks.spend.delay(user_id=user, seconds=1.5)
    wait_for(lambda: shared_host.used(user), "the call is charged")
    owner = shared_host.value("SELECT owner FROM trueup.hold WHERE status = 'open' AND user_id = :user", user=user)
    [child] = [process for process in worker.pool() if str(process.pid) == owner.rpartition(":")[2]]
    child.kill()
    if CELERY_RETRIES_LOST_TASKS:
        assert result.get(timeout=DEADLINE_SECONDS) == shared_host.used(user)
        assert shared_host.value("SELECT max(attempt) FROM trueup.hold WHERE user_id = :user", user=user) == 2
    else:
        with pytest.raises(WorkerLostError):
            result.get(timeout=DEADLINE_SECONDS)
    assert shared_host.value("SELECT count(*) FROM ai_usage_log WHERE user_id = :user", user=user) == 1
    wait_for(lambda: not held(shared_host, user), "nothing is held")


def test_a_denial_ends_a_chain(app: Celery, worker: WorkerProcess, shared_host: Host) -> None:
    rich, poor = shared_host.subscriber(1_000), shared_host.subscriber(10)
    work = chain(model_tasks.spend.si(user_id=poor), model_tasks.spend.si(user_id=rich))()
    with pytest.raises(TokensDenied):
        work.parent.get(timeout=DEADLINE_SECONDS)
    with pytest.raises((TokensDenied, ResultTimeoutError)):
        work.get(timeout=0.5)
    assert shared_host.used(rich) == 0


def test_while_the_database_is_away_a_task_waits_and_then_runs(
    app: Celery, worker: WorkerProcess, shared_host: Host, admin_engine: Engine
) -> None:
    user, name = shared_host.subscriber(1_000), shared_host.value("SELECT current_database()")
    model_tasks.spend.delay(user_id=user).get(timeout=DEADLINE_SECONDS)
    before = shared_host.used(user)
    close = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name AND application_name = 'trueup'"
    )
    with admin_engine.connect() as admin:
        admin.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        try:
            admin.execute(text(close), {"name": name})
            result = model_tasks.spend.delay(user_id=user, words=20)
            wait_for(lambda: "does not answer" in worker.output, "the worker notices")
            assert result.state in ("PENDING", "STARTED", "RETRY")
            assert shared_host.used(user) == before
        finally:
            admin.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    assert result.get(timeout=DEADLINE_SECONDS) > 0
    assert shared_host.used(user) > before


def test_while_the_hosts_usage_goes_uncounted_a_task_waits_and_runs_after_attaching(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    shared_host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted")
    try:
        result = model_tasks.spend.delay(user_id=user)
        wait_for(lambda: "trigger trueup_inserted is disabled" in worker.output, "the worker notices")
        assert shared_host.used(user) == 0
    finally:
        attach(HostMapping())
    assert result.get(timeout=DEADLINE_SECONDS) == shared_host.used(user) > 0


def test_reconciling_runs_as_a_task(app: Celery, worker: WorkerProcess, shared_host: Host) -> None:
    user = shared_host.subscriber(1_000)
    shared_host.log(user, 3)  # no plan is as small, so that it can't be one
    app.tasks["trueup.reconcile_counters"].apply_async().get(timeout=DEADLINE_SECONDS)
    shared_host.execute("UPDATE billing_subscription SET tokens_remaining = NULL WHERE user_id = :user", user=user)
    figures = app.tasks["trueup.reconcile_counters"].apply_async().get(timeout=DEADLINE_SECONDS)
    # Other tests have left users whose decrements may still come.
    assert figures["drifted"] >= figures["corrected"] >= 1
    assert shared_host.counter(user) == 997


@pytest.mark.parametrize("task", [model_tasks.limited, model_tasks.soft])
def test_a_task_that_takes_too_long_gives_its_hold_back(
    task: Task, app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    result = task.delay(user_id=user)
    with pytest.raises((TimeLimitExceeded, SoftTimeLimitExceeded)):
        result.get(timeout=DEADLINE_SECONDS)
    wait_for(lambda: not held(shared_host, user), "nothing is held")
    assert shared_host.value("SELECT status FROM trueup.hold WHERE user_id = :user", user=user) == "settled"
    assert shared_host.used(user) > 0


def test_a_revoked_task_gives_its_hold_back(app: Celery, worker: WorkerProcess, shared_host: Host) -> None:
    user = shared_host.subscriber(1_000)
    result = model_tasks.spend.delay(user_id=user, seconds=60)
    wait_for(lambda: shared_host.used(user), "the call is charged")
    result.revoke(terminate=True, signal="SIGKILL")
    wait_for(lambda: not held(shared_host, user), "nothing is held")
    assert shared_host.value("SELECT status FROM trueup.hold WHERE user_id = :user", user=user) == "settled"


def test_a_duplicate_waits_while_the_first_delivery_is_at_work(
    app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(1_000)
    first = model_tasks.spend.apply_async(kwargs={"user_id": user, "seconds": 2})
    wait_for(lambda: shared_host.used(user), "the call is charged")
    for _ in range(3):
        model_tasks.spend.apply_async(kwargs={"user_id": user, "seconds": 2}, task_id=first.id)
    wait_for(lambda: worker.output.count(f"{first.id}] ignored") == 3, "none of the duplicates tells a result")
    assert worker.output.count(f"attempt of task {first.id} is running") == 1, "one waits, two are redundant"
    assert first.state == "STARTED"
    assert shared_host.value("SELECT attempt FROM trueup.hold WHERE user_id = :user", user=user) == 1
    wait_for(lambda: not held(shared_host, user), "the first is done")
    assert shared_host.value("SELECT count(*) FROM ai_usage_log WHERE user_id = :user", user=user) == 1
