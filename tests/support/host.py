"""The host application of the tests: plain SQL on its own tables, as a Django application would send it."""

import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event, text

START = datetime(2024, 11, 1, 12, tzinfo=UTC)
"""The start of the tests' subscriptions, unless a test gives another.

It is long ago. A test injects times up to a few months later, and triggers use the server's clock, so those times are
before the server's clock now and in ten years.
"""
NOW = START + timedelta(days=3)
"""The moment at which such tests act."""


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


class Host:
    """A host with one connection, on which each statement is its own transaction."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = itertools.count(1)

    def __enter__(self) -> Self:
        self.connection: Connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()

    def execute(self, statement: str, **values: Any) -> Any:
        return self.connection.execute(text(statement), values)

    def value(self, statement: str, **values: Any) -> Any:
        return self.execute(statement, **values).scalar_one()

    def plan(self, tokens: int, *, kind: str = "token") -> int:
        """Sell a plan. Returns its id."""
        number = next(self._ids)
        duration = ", duration_days" if kind == "full" else ""
        days = ", 30" if kind == "full" else ""
        self.execute(
            f"INSERT INTO billing_{kind}plan (id, name, tokens_included{duration}) VALUES (:id, :name, :tokens{days})",
            id=number,
            name=f"{kind} {tokens}",
            tokens=tokens,
        )
        return number

    def user(self) -> int:
        """Sign up a user without a subscription. Returns its id."""
        number = next(self._ids)
        self.execute(
            "INSERT INTO accounts_user (id, username, email) VALUES (:id, :name, :email)",
            id=number,
            name=f"user{number}",
            email=f"user{number}@example.com",
        )
        return number

    def subscriber(
        self,
        tokens: int = 10_000,
        *,
        kind: str = "token",
        start: datetime = START,
        end: datetime | None = None,
        active: bool = True,
        counter: int | str | None = "plan",
    ) -> int:
        """Sign up a user with a subscription to a plan of that size. Returns the user's id.

        `counter`: the value of the legacy counter; by default the plan's tokens.
        """
        plan, user = self.plan(tokens, kind=kind), self.user()
        self.execute(
            f"INSERT INTO billing_subscription (id, user_id, {kind}_plan_id, start_date, end_date, is_active, "
            "tokens_remaining) VALUES (:id, :user, :plan, :start, :end, :active, :counter)",
            id=next(self._ids),
            user=user,
            plan=plan,
            start=start,
            end=end,
            active=active,
            counter=tokens if counter == "plan" else counter,
        )
        return user

    def log(
        self,
        user: int,
        tokens: int | None,
        *,
        success: bool = True,
        at: datetime = START + timedelta(hours=1),
        section: str = "chat",
    ) -> uuid.UUID:
        """Log an AI call, as the host does. Returns the row's id."""
        row = uuid.uuid4()
        self.execute(
            "INSERT INTO ai_usage_log (id, user_id, section, total_tokens, success, created_at) "
            "VALUES (:id, :user, :section, :tokens, :success, :at)",
            id=row,
            user=user,
            section=section,
            tokens=tokens,
            success=success,
            at=at,
        )
        return row

    def decrement(self, user: int, tokens: int) -> None:
        """Lower the counter, as the host does."""
        self.execute(
            "UPDATE billing_subscription SET tokens_remaining = greatest(tokens_remaining - :tokens, 0) "
            "WHERE user_id = :user",
            user=user,
            tokens=tokens,
        )

    def date_change(self, at: datetime) -> None:
        """Change the time of a subscription's last change, which a trigger has saved by the server's clock."""
        self.execute(
            "UPDATE trueup.window_change SET changed_at = :at "
            "WHERE id IN (SELECT id FROM trueup.window_change ORDER BY id DESC LIMIT 2)",
            at=at,
        )

    def counter(self, user: int) -> int | None:
        counter: int | None = self.value(
            "SELECT tokens_remaining FROM billing_subscription WHERE user_id = :user", user=user
        )
        return counter

    def used(self, user: int) -> int:
        """Return the sum of the user's counted log rows, in any window."""
        used: int = self.value(
            "SELECT coalesce(sum(total_tokens), 0) FROM ai_usage_log WHERE user_id = :user AND success", user=user
        )
        return used


@contextmanager
def host_of(url: str) -> Iterator[Host]:
    """Give the host application of a database, with its own connection, and close both at the end of the block."""
    engine = pooled_engine(url)
    with Host(engine) as host:
        yield host
    engine.dispose()


def pooled_engine(url: str | URL) -> Engine:
    """Return an engine that reuses its sessions. To begin one takes PostgreSQL longer than most statements.

    A session that comes back has no settings, role, locks or temporary tables of its earlier use.
    """
    engine = create_engine(url, pool_reset_on_return=None, pool_pre_ping=True, max_overflow=-1)

    def clear(connection: psycopg.Connection[Any], _record: object, _state: object) -> None:
        connection.rollback()
        connection.autocommit = True
        connection.execute(
            "RESET SESSION AUTHORIZATION; RESET ALL; SELECT pg_advisory_unlock_all(); DISCARD TEMP; UNLISTEN *"
        )
        connection.autocommit = False

    event.listen(engine, "reset", clear)
    return engine
