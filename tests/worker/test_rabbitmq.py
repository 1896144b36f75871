"""A host's own Celery application on RabbitMQ, with classic and with quorum queues: no task is lost or paid twice."""

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult
from sqlalchemy import Connection

from tests.support.amqp_shop import BROKER, DOOR, QUEUE, RESULTS, dead_letters_of, make_shop, queue_of
from tests.support.host import Host
from tests.support.rabbitmq import find_rabbitmq, running_rabbitmq
from tests.support.tcp_proxy import proxy_to
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.work import balance
from tests.support.worker import WorkerProcess, close_connections, running_command
from trueup.gate.holds import expire_holds
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.stack import StackUrls
from trueup.tasks.requeue import REJECT_PAUSE_SECONDS

KINDS = ("classic", "quorum")


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[int]:
    """A RabbitMQ. Gives its port."""
    program = find_rabbitmq()
    if program is None:
        pytest.skip("NOT TESTED: no RabbitMQ here; `apt-get install rabbitmq-server` brings it")
    with running_rabbitmq(program) as port:
        yield port


def url_of(port: int, user: str = "guest") -> str:
    return f"amqp://{user}:{user}@127.0.0.1:{port}//"


@dataclass
class Shop:
    """The host's application: its sender, its workers, and the door for which the bodies of its tasks wait."""

    kind: str
    port: int
    results: str
    folder: Path
    user: str = "guest"
    workers: int = 0

    def __post_init__(self) -> None:
        # A queue of its own: a delayed message of another test may come only now.
        self.words = f"shop-{uuid.uuid4().hex} {self.kind}"
        self.app = make_shop(url_of(self.port), self.results, self.words, current=False)
        self.queue = queue_of(self.words)
        with self.app.connection_for_write() as connection:
            channel = connection.default_channel
            channel.queue_declare(dead_letters_of(self.queue.name), durable=True, auto_delete=False)
            self.queue(channel).declare()

    def send(self, user: int, **options: Any) -> AsyncResult:
        return self.app.send_task("shop.describe", kwargs={"user_id": user}, queue=self.queue.name, **options)

    def open_door(self) -> None:
        (self.folder / "door").touch()

    def waiting(self, queue: str) -> int:
        """Return how many messages a queue has ready."""
        with self.app.connection_for_write() as connection:
            count: int = connection.default_channel.queue_declare(queue, passive=True).message_count
            return count

    @contextmanager
    def worker(self, *, port: int | None = None, user: str = "guest") -> Iterator[WorkerProcess]:
        """Run a worker. `port` None: it connects to RabbitMQ directly."""
        self.workers += 1
        environment = {
            **os.environ,
            BROKER: url_of(port or self.port, user),
            RESULTS: self.results,
            QUEUE: self.words,
            DOOR: str(self.folder / "door"),
        }
        celery = Path(sys.executable).with_name("celery")
        command = [celery, "-A", "tests.support.amqp_shop", "worker", "-c", "2", "-n", f"shop{self.workers}@%h"]
        log = self.folder / f"worker-{self.workers}.log"
        with running_command([*command, "-l", "INFO"], log, environment=environment) as worker:
            yield worker


MakeShop = Callable[[str], AbstractContextManager[Shop]]


@pytest.fixture
def make(rabbitmq: int, stack: StackUrls, tmp_path: Path) -> MakeShop:
    @contextmanager
    def shop_of(kind: str) -> Iterator[Shop]:
        shop = Shop(kind=kind, port=rabbitmq, results=str(stack.broker_url), folder=tmp_path)
        yield shop
        close_connections(shop.app)
        shop.app.close()

    return shop_of


def charges(host: Host, user: int) -> int:
    count: int = host.value("SELECT count(*) FROM ai_usage_log WHERE user_id = :user", user=user)
    return count


def end_lease(host: Host, user: int) -> None:
    """Let the lease's time pass."""
    host.execute("UPDATE trueup.hold SET lease_until = '-infinity' WHERE user_id = :user", user=user)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_workers_task_is_redelivered_and_its_paid_call_is_replayed(
    kind: str, make: MakeShop, host: Host
) -> None:
    user = host.subscriber(1_000)
    with make(kind) as shop:
        result = shop.send(user)
        with shop.worker() as first:
            wait_for(lambda: charges(host, user), "the call is charged")
            first.kill()
        end_lease(host, user)
        shop.open_door()
        with shop.worker():
            assert result.get(timeout=DEADLINE_SECONDS) == host.used(user) > 0
    assert charges(host, user) == 1
    wait_for(lambda: balance(host, user)[1] == 0, "nothing is held")


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_the_gate_keeps_waiting_is_delayed_and_runs_once(kind: str, make: MakeShop, host: Host) -> None:
    user = host.subscriber(1_000)
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted")
    with make(kind) as shop, shop.worker() as worker:
        shop.open_door()
        began = datetime.now(UTC)
        result = shop.send(user)
        wait_for(lambda: worker.output.count("task waits") >= 3, "the task waits a third time")
        # The delays grow: at least 0.5 s and 1 s before the third. A message that comes back at once takes none.
        assert datetime.now(UTC) - began > timedelta(seconds=1.5)
        attach(HostMapping())
        assert result.get(timeout=DEADLINE_SECONDS) == host.used(user) > 0
        assert charges(host, user) == 1
        assert shop.waiting(shop.queue.name) == 0


def test_a_requeued_task_whose_message_was_in_its_queue_before_is_not_dropped_as_a_cycle(
    make: MakeShop, host: Host
) -> None:
    user = host.subscriber(1_000)
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted")
    with make("quorum") as shop, shop.worker() as worker:
        shop.open_door()
        # As RabbitMQ notes it on a delayed message.
        names = {"queue": shop.queue.name, "exchange": "celery_delayed_0", "routing-keys": [shop.queue.name]}
        death = {**names, "reason": "expired", "count": 1, "time": datetime.now(UTC)}
        result = shop.send(user, headers={"x-death": [death], "x-first-death-queue": shop.queue.name})
        wait_for(lambda: "task waits" in worker.output, "the task waits")
        attach(HostMapping())
        assert result.get(timeout=DEADLINE_SECONDS) == host.used(user) > 0


def test_a_task_whose_requeue_rabbitmq_refuses_pauses_and_stays_in_its_queue(
    make: MakeShop, host: Host, connection: Connection
) -> None:
    """The worker's user may not publish. RabbitMQ drops its message; only a confirmation tells."""
    user = host.subscriber(1_000)
    host.execute("ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted")
    with make("classic") as shop:
        shop.open_door()
        result = shop.send(user)
        with shop.worker(user="reader") as worker:
            began = datetime.now(UTC)
            wait_for(lambda: worker.output.count("broker took no new message") >= 3, "the requeue is refused again")
            assert datetime.now(UTC) - began > timedelta(seconds=2 * REJECT_PAUSE_SECONDS), "it does not spin"
            assert "ACCESS_REFUSED" in worker.output
            worker.kill()
        attach(HostMapping())
        with shop.worker():
            assert result.get(timeout=DEADLINE_SECONDS) == host.used(user) > 0
    assert charges(host, user) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_lost_in_the_middle_of_a_task_costs_nothing_twice(kind: str, make: MakeShop, host: Host) -> None:
    """RabbitMQ redelivers the message at once, while the first delivery still runs: the duplicate waits for it."""
    user = host.subscriber(1_000)
    with make(kind) as shop, proxy_to(shop.port) as proxy, shop.worker(port=proxy.port) as worker:
        result = shop.send(user)
        wait_for(lambda: charges(host, user), "the call is charged")
        proxy.cut()
        wait_for(lambda: "is running; this one retries" in worker.output, "the duplicate waits")
        assert host.value("SELECT attempt FROM trueup.hold WHERE user_id = :user", user=user) == 1
        shop.open_door()
        assert result.get(timeout=DEADLINE_SECONDS) == host.used(user) > 0
        wait_for(lambda: balance(host, user)[1] == 0, "nothing is held")
        assert charges(host, user) == 1
        assert worker.process.poll() is None


def test_a_message_beyond_the_delivery_limit_of_its_queue_is_a_dead_letter_and_its_hold_expires(
    make: MakeShop, host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    with make("quorum 1") as shop:
        shop.send(user)
        for _ in range(2):
            with shop.worker() as worker:
                wait_for(lambda: " started" in worker.output or _is_held(host, user), "a worker has the task")
                wait_for(lambda: charges(host, user), "the call is charged")
                wait_for(lambda: shop.waiting(shop.queue.name) == 0, "the message is with the worker")
                worker.kill()
            end_lease(host, user)
        wait_for(lambda: shop.waiting(dead_letters_of(shop.queue.name)) == 1, "the message is a dead letter")
        assert shop.waiting(shop.queue.name) == 0
    assert charges(host, user) == 1, "the paid call is recorded"
    expire_holds(connection, now=datetime.now(UTC) + timedelta(days=1))
    assert balance(host, user) == (host.used(user), 0)


def _is_held(host: Host, user: int) -> bool:
    return bool(host.value("SELECT count(*) FROM trueup.hold WHERE user_id = :user AND status = 'open'", user=user))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_worker_that_is_stopped_finishes_its_task_or_leaves_it_to_another(
    number: signal.Signals, make: MakeShop, host: Host
) -> None:
    user = host.subscriber(1_000)
    with make("quorum") as shop:
        result = shop.send(user)
        with shop.worker() as first:
            wait_for(lambda: charges(host, user), "the call is charged")
            first.process.send_signal(number)
            if number is signal.SIGTERM:
                shop.open_door()
            first.process.wait(DEADLINE_SECONDS)
        end_lease(host, user)
        shop.open_door()
        with shop.worker():
            assert result.get(timeout=DEADLINE_SECONDS) == host.used(user) > 0
    assert charges(host, user) == 1
    wait_for(lambda: balance(host, user)[1] == 0, "nothing is held")
