"""The PostgreSQL and Redis of a run, used by all its rounds: cloned databases, restarts, cut connections."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from tests.conftest import TEMPLATE, url_of_database
from tests.stack.helpers import servers as servers_of
from tests.stack.helpers import stack_processes, temporary_home
from tests.support.partitioned_tables import partition_by_user
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.settings.settings import Settings
from trueup.stack import running_stack
from trueup.stack.processes import first_of
from trueup.stack.waiting import wait_until

_GONE_SECONDS = 20.0


class Servers:
    """Both servers of one home."""

    def __init__(self, home: Path, database_url: str) -> None:
        self.home = home
        self._database_url = database_url
        self._postgres, self._redis = servers_of(home)
        self.admin = create_engine(
            url_of_database(database_url, "postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool
        )

    def engine(self, database: str) -> Engine:
        return create_engine(url_of_database(self._database_url, database), poolclass=NullPool)

    def database_url(self, database: str) -> str:
        return url_of_database(self._database_url, database)

    def broker_url(self, number: int) -> str:
        """Return the URL of one of Redis's databases."""
        return f"redis+socket://{self._redis.socket}?virtual_host={number}"

    def redis(self, number: int) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self._redis.socket), db=number, decode_responses=True)

    def make_template(self, partitions: int | None) -> None:
        """Make the template of the rounds' databases: the host's tables and trueup's.

        `partitions`: split trueup's large tables by user into so many; None: they are plain.
        """
        self._admin(f"CREATE DATABASE {TEMPLATE}")
        engine = self.engine(TEMPLATE)
        with engine.begin() as connection:
            install(connection, HostMapping(), with_host_tables=True)
            if partitions is not None:
                partition_by_user(connection, partitions)

    def make_database(self, name: str) -> None:
        self._admin(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")

    def drop_database(self, name: str) -> None:
        self._admin(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def cut_sessions(self, database: str) -> int:
        """End every session that trueup has there. Returns how many."""
        with self.admin.connect() as connection:
            return connection.scalar(
                text(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE datname = :name AND application_name = 'trueup'"
                ),
                {"name": database},
            )

    def restart_postgres(self) -> None:
        """Stop PostgreSQL at once, as in a crash. The next start replays the log."""
        main = first_of(self._postgres.processes())
        if main:
            main.send_signal(signal.SIGQUIT)
        wait_until(lambda: not self._postgres.processes(), _GONE_SECONDS)
        self._postgres.ensure_running()

    def restart_redis(self, number: signal.Signals, away_seconds: float) -> None:
        """Stop Redis with that signal, and start it again after a while."""
        main = first_of(self._redis.processes())
        if main:
            main.send_signal(number)
        wait_until(lambda: not self._redis.processes(), _GONE_SECONDS)
        time.sleep(away_seconds)
        self._redis.ensure_running()

    def flush_redis(self) -> None:
        with self.redis(0) as client:
            client.flushall()

    def cut_redis(self) -> int:
        """Close every client's connection. Returns how many."""
        with self.redis(0) as client:
            return sum(client.client_kill_filter(_type=kind, skipme=True) for kind in ("normal", "pubsub"))

    def ensure(self) -> None:
        """Start the servers that do not run."""
        self._postgres.ensure_running()
        self._redis.ensure_running()

    def _admin(self, statement: str) -> None:
        for _ in range(3):  # a new session may belong to a server that is shutting down
            with suppress(DBAPIError), self.admin.connect() as connection:
                connection.execute(text(statement))
                return
        with self.admin.connect() as connection:
            connection.execute(text(statement))


@contextmanager
def running_servers(partitions: int | None = None) -> Iterator[Servers]:
    """Run both servers in a home of their own until the block ends in any way. `partitions`: see `make_template`."""
    with temporary_home() as home, running_stack(Settings(home=home, database_url=None, broker_url=None)) as urls:
        assert urls.database_url is not None
        servers = Servers(home, urls.database_url)
        servers.make_template(partitions)
        yield servers
    assert not stack_processes(home)
