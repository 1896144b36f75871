"""The preparation of a round: its database, users, servers and workers."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from celery import Celery
from sqlalchemy import Engine

from tests.faults.graph import FakeGraph
from tests.faults.kinds import VISIBILITY_SECONDS
from tests.faults.loopback import TIMEOUT_SECONDS, running
from tests.faults.plans import RoundPlan
from tests.faults.provider import MODEL_NAME, FakeProvider
from tests.faults.servers import Servers
from tests.faults.stages import Stage, redis_number
from tests.faults.workers import REPOSITORY, Worker
from tests.support.host import Host


@contextmanager
def staged(plan: RoundPlan, servers: Servers, logs: Path) -> Iterator[Stage]:
    """Give a round its database, users, provider and workers, which boot meanwhile. End them all at the end."""
    database = f"faults_{plan.number}"
    with ExitStack() as stack:
        stack.callback(servers.drop_database, database)
        servers.make_database(database)
        engine = servers.engine(database)
        stack.callback(engine.dispose)
        provider = stack.enter_context(running(FakeProvider(plan)))
        graph = stack.enter_context(running(FakeGraph(plan.posting)))
        sender = stack.enter_context(_sender(servers.broker_url(redis_number(plan))))
        stage = Stage(
            plan=plan,
            servers=servers,
            database=database,
            engine=engine,
            provider=provider,
            graph=graph,
            workers=[],
            sender=sender,
        )
        stage.users = _sign_up(engine, plan.budgets)
        with servers.redis(redis_number(stage.plan)) as client:
            client.flushdb()
        environment = _environment(stage)
        for number in range(plan.workers):
            worker = Worker(
                name=f"r{plan.number}w{number}",
                log=logs / f"round-{plan.number}-worker-{number}.log",
                environment=environment,
                concurrency=plan.concurrency,
                skew_seconds=0.0 if number else plan.skew_seconds,
            )
            stack.callback(worker.kill)
            stage.workers.append(worker)
            worker.start()
        yield stage


@contextmanager
def _sender(broker_url: str) -> Iterator[Celery]:
    """Return the host's Celery application. It sends tasks and does not wait for results."""
    with Celery("faults", broker=broker_url, set_as_current=False) as app:
        app.conf.update(task_ignore_result=True)
        yield app


def _sign_up(engine: Engine, budgets: tuple[int, ...]) -> list[int]:
    with Host(engine) as host:
        return [host.subscriber(tokens, start=datetime.now(UTC) - timedelta(days=1)) for tokens in budgets]


def _environment(stage: Stage) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("TRUEUP_", "OPENAI_"))}
    return outside | {
        # A copy of the source tree tests itself, even if another trueup is installed.
        "PYTHONPATH": str(REPOSITORY),
        "TRUEUP_HOME": str(stage.servers.home),
        "TRUEUP_DATABASE_URL": stage.servers.database_url(stage.database),
        "TRUEUP_BROKER_URL": stage.servers.broker_url(redis_number(stage.plan)),
        "TRUEUP_VISIBILITY_TIMEOUT_SECONDS": str(max(5, VISIBILITY_SECONDS)),
        "TRUEUP_GATE_RETRY_MAX_SECONDS": "1",
        "TRUEUP_MODEL_PROVIDER": "openai",
        "TRUEUP_MODEL_NAME": MODEL_NAME,
        "TRUEUP_MODEL_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
        "TRUEUP_OPENAI_BASE_URL": f"{stage.provider.url}/v1",
        "TRUEUP_INSTAGRAM_GRAPH_URL": stage.graph.url,
        "TRUEUP_INSTAGRAM_ACCESS_TOKEN": "none",
        "TRUEUP_INSTAGRAM_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
        "TRUEUP_DATABASE_POOL_SIZE": "2",
    }
