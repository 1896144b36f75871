"""Shards of reconcile runs: a range of users each, with who works on it and how far that has come, in the database.

A shard's cursor moves in the transaction that did the work up to it. Whoever takes over a shard goes on from there.
"""

import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from trueup.accounts.user_ids import UserId
from trueup.errors import TrueupError
from trueup.host.mapping import HostMapping, UserIdType
from trueup.host.sql import render_statement

LEASE_SECONDS = 30.0
"""How long a run or shard stays its owner's without a sign of life."""

MAX_FAILURES = 5
"""How often a shard may fail, without getting on in between, before it is given up."""

PAGE_SIZE = 50_000
"""How many suspects of a shard are fetched at once: what a process keeps in memory."""


class ShardLostError(TrueupError):
    """Another has taken over this shard, because this process gave no sign of life. Nothing more was written."""

    def __init__(self) -> None:
        super().__init__("another process has taken over this part of the run; this one stops here")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one batch moves in its shard: `cursor` to the last user it checked, `checked` to so many in all."""

    number: int
    attempt: int
    cursor: UserId
    checked: int


@dataclass(kw_only=True)
class Shard:
    """A range of users: those after `after`, up to `last`; None: no bound. `cursor` None: nothing is done yet.

    `run_id` None: of a dry run, in memory only. `attempt` fences whoever had it before. `total`: its subscriptions,
    counted when it was begun first; None until then. `checked`: how many of them are done. `audited`: its balances have
    been compared with the log. `refused`: how many users' rows the database would not take. `slow`: how many users were
    passed over because of a time limit. `pace`: how many are taken into the next batch; 0: as many as may be.
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
    def position(self) -> UserId | None:
        """After which user there is something left; None: from the first."""
        return self.after if self.cursor is None else self.cursor


def new_owner() -> str:
    """Return a name for whoever works on shards: for people, and never given twice."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


_CLAIM = text(
    "SELECT * FROM trueup.claim_shard(:run_id, CAST(:number AS integer), :owner, make_interval(secs => :lease), :most)"
)


def claim_shard(connection: Connection, run_id: int, owner: str, *, number: int | None = None) -> Shard | None:
    """Take a shard of the run that nobody works on; `number` None: any. None: there is none, or not that one."""
    values = {"run_id": run_id, "number": number, "owner": owner, "lease": LEASE_SECONDS, "most": MAX_FAILURES}
    row = connection.execute(_CLAIM, values).one_or_none()
    connection.rollback()
    return None if row is None else Shard.of_row(row)


_RELOAD = text(
    "SELECT * FROM trueup.reconcile_shard WHERE run_id = :run_id AND number = :number AND attempts = :attempt "
    "AND status = 'running'"
)


def reload_shard(connection: Connection, shard: Shard) -> None:
    """Read how far the shard has come: after an error, whether the last batch was written is not known.

    Raises `ShardLostError`.
    """
    if shard.run_id is None:
        return
    row = connection.execute(
        _RELOAD, {"run_id": shard.run_id, "number": shard.number, "attempt": shard.attempt}
    ).one_or_none()
    connection.rollback()
    if row is None:
        raise ShardLostError
    shard.cursor, shard.checked = row.cursor_user, row.checked


def measure_shard(connection: Connection, shard: Shard, total: int) -> None:
    """Note how many subscriptions the shard has."""
    shard.total = total
    if shard.run_id is None:
        return
    connection.execute(
        text(
            "UPDATE trueup.reconcile_shard SET total = :total "
            "WHERE run_id = :run_id AND number = :number AND attempts = :attempt"
        ),
        {"total": total, "run_id": shard.run_id, "number": shard.number, "attempt": shard.attempt},
    )
    connection.rollback()


def move_shard(connection: Connection, run_id: int | None, step: Step | None, user_id_type: UserIdType) -> None:
    """Note how far a shard has come, for a batch that has nothing else to write. Raises `ShardLostError`."""
    if run_id is None or step is None:
        return
    statement = text(f"SELECT trueup.move_shard(:run_id, :number, :attempt, CAST(:cursor AS {user_id_type}), :checked)")
    values = {
        "run_id": run_id,
        "number": step.number,
        "attempt": step.attempt,
        "cursor": step.cursor,
        "checked": step.checked,
    }
    moved = connection.scalar(statement, values)
    connection.rollback()
    if not moved:
        raise ShardLostError


_END = text("SELECT trueup.end_shard(:run_id, :number, :attempt, :status, :checked, :error)")


def end_shard(connection: Connection, shard: Shard, *, finished: bool, error: str | None = None) -> bool:
    """Let go of the shard, `finished` or for another to go on with. `error` None: it was only asked to stop.

    Returns False if another has taken it over.
    """
    if shard.run_id is None:
        return True
    ended = connection.scalar(
        _END,
        {
            "run_id": shard.run_id,
            "number": shard.number,
            "attempt": shard.attempt,
            "status": "finished" if finished else "waiting",
            "checked": shard.checked,
            "error": error,
        },
    )
    connection.rollback()
    return bool(ended)


_KEEP = text("SELECT trueup.keep_run(:run_id, :owner, make_interval(secs => :lease))")


@contextmanager
def kept_alive(engine: Engine, run_id: int, owner: str) -> Iterator[None]:
    """Give signs of life for what the owner works on, also in long statements: by a thread with its own connection.

    One that can't be given is left out: then the lease runs out, and what is still sent is refused.
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
    """Return the last users of all shards of that many subscriptions but the last one, which has no end."""
    return list(connection.scalars(text("SELECT trueup.shard_ends(:size)"), {"size": size}))


_SUBSCRIPTIONS = """
    SELECT count(*) FROM {{ subscription }} s
    WHERE s.{{ subscription.user_id }} IS NOT NULL{{ within("s." ~ subscription.user_id) }}
"""


def count_subscriptions(connection: Connection, mapping: HostMapping, after: UserId | None, last: UserId | None) -> int:
    """Return how many subscriptions the range has; None: no bound."""
    statement = render_statement(_SUBSCRIPTIONS, mapping, within=conditions_of(after, last))
    counted = connection.scalar(statement, bounds(after, last))
    return counted or 0


def count_subscriptions_of(connection: Connection, mapping: HostMapping, user_id: UserId) -> int:
    """Return how many subscriptions that user has."""
    statement = render_statement(_SUBSCRIPTIONS, mapping, within=" AND {} = :user_id".format)
    counted = connection.scalar(statement, {"user_id": user_id})
    return counted or 0


# All but those whose counter is plainly right by a balance that is up to date. Coarse on purpose, and one statement
# over the whole range: that is what makes a pass that finds nothing as cheap as the bare comparison. It never looks at
# the log. Whoever has grants is looked at closely too: what those count for is not told in a line. (No function of
# ours is called in it: PostgreSQL then may work on it in parallel.)
_SUSPECTS = """
    {% from "host/rows.sql" import plan_tokens, window_start %}
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
          AND NOT coalesce(
              b.window_start = {{ window_start("s") }}
              AND b.log_epoch = (SELECT coalesce(max(id), 0) FROM trueup.log_truncation)
              AND s.{{ subscription.tokens_remaining }} = greatest({{ plan_tokens() }} - b.consumed, 0)
              AND d.user_id IS NULL AND g.user_id IS NULL, false)
    )
    SELECT user_id FROM suspects ORDER BY user_id LIMIT :page
"""


def find_suspects(
    connection: Connection, mapping: HostMapping, after: UserId | None, last: UserId | None, *, page: int = PAGE_SIZE
) -> list[UserId]:
    """Return the users of a range whose counters are to be looked at closely, in order, at most a page of them."""
    statement = render_statement(_SUSPECTS, mapping, within=conditions_of(after, last))
    return list(connection.scalars(statement, {"page": page, **bounds(after, last)}))


def conditions_of(after: UserId | None, last: UserId | None) -> Callable[[str], str]:
    """Return what makes a range's conditions on a column, for a template.

    A bound that is None has no condition, so that the planner sees what there is.
    """
    conditions = ("" if after is None else " AND {0} > :after") + ("" if last is None else " AND {0} <= :last")
    return conditions.format


def bounds(after: UserId | None, last: UserId | None) -> dict[str, Any]:
    return {name: value for name, value in (("after", after), ("last", last)) if value is not None}
