"""Shards of reconcile runs. A shard is a range of users, with an owner, a lease and a cursor in the database.

The cursor moves in the transaction that did the work before it. A process that takes over a shard continues there.
"""

import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from trueup.accounts.user_ids import UserId
from trueup.errors import TrueupError
from trueup.host.mapping import HostMapping, UserIdType
from trueup.host.sql import render_statement

LEASE_SECONDS = 30.0
"""How long a run or shard belongs to its owner without a heartbeat."""

MAX_FAILURES = 5
"""How many times in a row a shard may fail without progress before it is given up."""

PAGE_SIZE = 50_000
"""How many suspects of a shard a process fetches at once and keeps in memory."""


class ShardLostError(TrueupError):
    """Another process has taken over this shard, because this one's lease expired. Nothing more was written."""

    def __init__(self) -> None:
        super().__init__(
            "Another process has taken over this shard of the run, because this process sent no heartbeat in time. "
            "This process stops working on it; the other one finishes it."
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """A shard's progress after a batch. `cursor`: the last checked user. `checked`: all users checked so far."""

    number: int
    attempt: int
    cursor: UserId
    checked: int


@dataclass(kw_only=True)
class Shard:
    """A range of users after `after`, up to and including `last`; None: no bound. `cursor` None: no user is done yet.

    `run_id` None: a shard of a dry run, in memory only. `attempt`: number of the claim; writes of earlier attempts are
    refused. `total`: number of subscriptions, counted by the first attempt; None: not counted yet. `checked`: how many
    of them are done. `audited`: the balances have been compared with the log. `refused`: users whose correction the
    database refused. `slow`: users skipped because of a time limit. `pace`: users in the next batch; 0: the maximum.
    """

    run_id: int | None = None
    number: int = 1
    attempt: int = 1
    after: UserId | None = None
    last: UserId | None = None
    cursor: UserId | None = None
    total: int | None = None
    checked: int = 0
    audited: bool = False
    refused: int = 0
    slow: int = 0
    pace: int = 0

    @classmethod
    def of_row(cls, row: Any) -> Self:
        return cls(
            run_id=row.run_id,
            number=row.number,
            attempt=row.attempts,
            after=row.first_user,
            last=row.last_user,
            cursor=row.cursor_user,
            total=row.total,
            checked=row.checked,
        )

    @property
    def claim(self) -> dict[str, Any]:
        """The parameters of statements that only the current attempt may execute."""
        return {"run_id": self.run_id, "number": self.number, "attempt": self.attempt}

    @property
    def position(self) -> UserId | None:
        """The user after whom the remaining work begins; None: it begins with the first user."""
        return self.after if self.cursor is None else self.cursor


def new_owner() -> str:
    """Return a unique, readable name for an owner of shards: host name, process id and a random part."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


_CLAIM = text(
    "SELECT * FROM trueup.claim_shard(:run_id, CAST(:number AS integer), :owner, make_interval(secs => :lease), :most)"
)


def claim_shard(connection: Connection, run_id: int, owner: str, *, number: int | None = None) -> Shard | None:
    """Claim an unclaimed shard of the run, or one whose lease has expired. Returns None if there is none.

    `number`: claim only this shard; None: any.
    """
    values = {"run_id": run_id, "number": number, "owner": owner, "lease": LEASE_SECONDS, "most": MAX_FAILURES}
    row = connection.execute(_CLAIM, values).one_or_none()
    connection.rollback()
    return None if row is None else Shard.of_row(row)


_RELOAD = text(
    "SELECT * FROM trueup.reconcile_shard WHERE run_id = :run_id AND number = :number AND attempts = :attempt "
    "AND status = 'running'"
)


def reload_shard(connection: Connection, shard: Shard) -> None:
    """Read the shard's cursor after an error, when it is not known whether the last batch was committed.

    Raises `ShardLostError`.
    """
    if shard.run_id is None:
        return
    row = connection.execute(_RELOAD, shard.claim).one_or_none()
    connection.rollback()
    if row is None:
        raise ShardLostError
    shard.cursor, shard.checked = row.cursor_user, row.checked


def measure_shard(connection: Connection, shard: Shard, total: int) -> None:
    """Record `total`, the number of subscriptions of the shard."""
    shard.total = total
    if shard.run_id is None:
        return
    connection.execute(
        text(
            "UPDATE trueup.reconcile_shard SET total = :total "
            "WHERE run_id = :run_id AND number = :number AND attempts = :attempt"
        ),
        {"total": total, **shard.claim},
    )
    connection.rollback()


def move_shard(connection: Connection, run_id: int | None, step: Step | None, user_id_type: UserIdType) -> None:
    """Record a shard's progress after a batch that has nothing else to write. Raises `ShardLostError`."""
    if run_id is None or step is None:
        return
    statement = text(f"SELECT trueup.move_shard(:run_id, :number, :attempt, CAST(:cursor AS {user_id_type}), :checked)")
    moved = connection.scalar(statement, {"run_id": run_id, **asdict(step)})
    connection.rollback()
    if not moved:
        raise ShardLostError


_END = text("SELECT trueup.end_shard(:run_id, :number, :attempt, :status, :checked, :error)")


def end_shard(connection: Connection, shard: Shard, *, finished: bool, error: str | None = None) -> bool:
    """Release the shard. Returns False if another process has taken it over.

    `finished` False: another attempt continues it. `error` None: the attempt was stopped, not failed.
    """
    if shard.run_id is None:
        return True
    status = "finished" if finished else "waiting"
    ended = connection.scalar(_END, {**shard.claim, "status": status, "checked": shard.checked, "error": error})
    connection.rollback()
    return bool(ended)


_KEEP = text("SELECT trueup.keep_run(:run_id, :owner, make_interval(secs => :lease))")


@contextmanager
def kept_alive(engine: Engine, run_id: int, owner: str) -> Iterator[None]:
    """Send heartbeats for the owner's run and shards from a thread with its own connection, also in long statements.

    A heartbeat that fails is skipped. If too many fail, the lease expires and the owner's later writes are refused.
    """
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(LEASE_SECONDS / 3):
            try:
                with engine.begin() as connection:
                    connection.execute(_KEEP, {"run_id": run_id, "owner": owner, "lease": LEASE_SECONDS})
            except (DBAPIError, PoolTimeoutError):
                continue

    thread = threading.Thread(target=beat, name="reconcile-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def shard_ends(connection: Connection, size: int) -> list[UserId]:
    """Return the last user of each shard of `size` subscriptions, except of the last shard, which has no bound."""
    return list(connection.scalars(text("SELECT trueup.shard_ends(:size)"), {"size": size}))


_SUBSCRIPTIONS = """
    SELECT count(*) FROM {{ subscription }} s
    WHERE s.{{ subscription.user_id }} IS NOT NULL{{ within("s." ~ subscription.user_id) }}
"""


def count_subscriptions(connection: Connection, mapping: HostMapping, after: UserId | None, last: UserId | None) -> int:
    """Return the number of subscriptions of users after `after`, up to and including `last`; None: no bound."""
    statement = render_statement(_SUBSCRIPTIONS, mapping, within=conditions_of(after, last))
    counted = connection.scalar(statement, bounds(after, last))
    return counted or 0


def count_subscriptions_of(connection: Connection, mapping: HostMapping, user_id: UserId) -> int:
    """Return the number of subscriptions of a user."""
    statement = render_statement(_SUBSCRIPTIONS, mapping, within=" AND {} = :user_id".format)
    counted = connection.scalar(statement, {"user_id": user_id})
    return counted or 0


# Suspects are all users except those whose counter agrees with an up-to-date balance. The test is coarse on purpose:
# one statement over the whole range makes a pass that finds nothing as cheap as the bare comparison. It never reads the
# log. Users with grants are always suspects, because a simple expression cannot compute the effect of grants. The
# statement calls no function of trueup's, so that PostgreSQL can run it in parallel.
_SUSPECTS = """
    {% from "host/rows.sql" import counter, plan_tokens, right_counter, window_start %}
    WITH suspects AS MATERIALIZED (
        SELECT s.{{ subscription.user_id }} AS user_id
        FROM {{ subscription }} s
        LEFT JOIN {{ token_plan }} tp ON tp.{{ token_plan.id }} = {{ subscription.token_plan_id("s") }}
        LEFT JOIN {{ full_plan }} fp ON fp.{{ full_plan.id }} = {{ subscription.full_plan_id("s") }}
        LEFT JOIN (SELECT * FROM trueup.balance WHERE true{{ within("user_id") }}) b
            ON b.user_id = s.{{ subscription.user_id }}
        LEFT JOIN (SELECT DISTINCT user_id FROM trueup.usage_delta WHERE true{{ within("user_id") }}) d
            ON d.user_id = s.{{ subscription.user_id }}
        LEFT JOIN (SELECT DISTINCT user_id FROM trueup.token_grant WHERE true{{ within("user_id") }}) g
            ON g.user_id = s.{{ subscription.user_id }}
        WHERE s.{{ subscription.user_id }} IS NOT NULL{{ within("s." ~ subscription.user_id) }}
          {% if subscription.unlimited %}
          AND {{ plan_tokens() }} <> {{ no_limit }}
          {% endif %}
          AND NOT coalesce(
              b.window_start = {{ window_start("s") }}
              AND b.log_epoch = (SELECT coalesce(max(id), 0) FROM trueup.log_truncation)
              AND {{ counter("s", plan_tokens()) }} = {{ right_counter(plan_tokens(), "b.consumed") }}
              AND d.user_id IS NULL AND g.user_id IS NULL, false)
    )
    SELECT user_id FROM suspects ORDER BY user_id LIMIT :page
"""


def find_suspects(
    connection: Connection, mapping: HostMapping, after: UserId | None, last: UserId | None, *, page: int = PAGE_SIZE
) -> list[UserId]:
    """Return the users of a range whose counters need a close check, in order, at most `page` of them.

    The range is the users after `after`, up to and including `last`; None: no bound.
    """
    statement = render_statement(_SUSPECTS, mapping, within=conditions_of(after, last))
    return list(connection.scalars(statement, {"page": page, **bounds(after, last)}))


def conditions_of(after: UserId | None, last: UserId | None) -> Callable[[str], str]:
    """Return a function that renders a range's conditions on a column, for a template.

    A bound that is None has no condition, so that the planner can use the bounds that exist.
    """
    conditions = ("" if after is None else " AND {0} > :after") + ("" if last is None else " AND {0} <= :last")
    return conditions.format


def bounds(after: UserId | None, last: UserId | None) -> dict[str, Any]:
    return {name: value for name, value in (("after", after), ("last", last)) if value is not None}
