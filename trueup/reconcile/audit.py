"""The deep pass compares balances with the log, checks trueup's own tables, repairs defects and records them.

One statement compares the sums of a range. A balance that differs is compared again under its lock, then repaired.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, text

from trueup.accounts.user_ids import UserId
from trueup.database.schema import own_table
from trueup.gate.holds import expire_holds
from trueup.host.mapping import HostMapping, UserIdType
from trueup.host.sql import UNCOUNTABLE, render_statement
from trueup.reconcile.shards import bounds, conditions_of

MAX_ANOMALIES = 100
"""The maximum number of defects per kind and range that are reported without repair."""

# Holds are expired within a minute of their time. A hold older than this shows that the expiry task does not run.
OVERDUE_AFTER = timedelta(minutes=10)
# A partition without triggers is reported once in this time, because quick passes run often.
REPORTED_AGAIN_AFTER = timedelta(days=1)
UNCOUNTABLE_REMEDY = (
    "The user's rows of the usage log add up to more than trueup can count, so the gate denies the user's tasks and "
    "the counter is not compared. Find the rows with the largest and the smallest tokens, and correct or delete them."
)
# Deep passes check a charge's log row once. Charges within this time before the last pass are checked again, because
# that pass may have missed them.
CHARGES_SINCE_MARGIN = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Defect:
    """A broken invariant in trueup's own tables or triggers. `user_id` None: it belongs to no single user.

    `seen`, `expected`: tokens, or counts of the rows that `kind` names; None: the kind has no such figure.
    """

    kind: str
    user_id: UserId | None = None
    seen: int | None = None
    expected: int | None = None
    repaired: bool = False
    detail: dict[str, Any] = field(default_factory=dict)


@contextmanager
def long_read(engine: Engine, timeout_seconds: int) -> Iterator[Connection]:
    """Give a connection, in a transaction, for a read that may take long.

    `timeout_seconds`: the time limit of each statement. The server cancels the statement within seconds after this
    process has died.
    """
    with engine.begin() as connection:
        connection.execute(text(f"SET LOCAL statement_timeout = '{timeout_seconds}s'"))
        connection.execute(text("SET LOCAL client_connection_check_interval = '5s'"))
        yield connection


# A stale balance is not a defect, because it is rebuilt when it is next read. The statement calls no function of
# trueup's, so that PostgreSQL can run it in parallel.
_MISMATCHES = """
    {% from "host/rows.sql" import countable, used_in_windows, window_start %}
    WITH epoch AS (SELECT coalesce(max(id), 0) AS epoch FROM trueup.log_truncation)
    SELECT * FROM (
        SELECT b.user_id, b.consumed + coalesce(d.tokens, 0) AS seen, coalesce(l.tokens, 0) AS expected,
               b.held, coalesce(h.tokens, 0) AS in_holds,
               coalesce(b.window_start = {{ window_start("s") }}
                        AND b.log_epoch = (SELECT epoch FROM epoch), false) AS is_current
        FROM trueup.balance b
        LEFT JOIN {{ subscription }} s ON s.{{ subscription.user_id }} = b.user_id
        LEFT JOIN (
            {{ used_in_windows("w." ~ subscription.user_id, within("l." ~ usage_log.user_id)) }}
        ) l ON l.key = b.user_id
        LEFT JOIN (
            SELECT t.user_id, {{ countable("sum(t.tokens)") }} AS tokens
            FROM trueup.usage_delta t JOIN trueup.balance k ON k.user_id = t.user_id AND t.used_at >= k.window_start
            GROUP BY 1
        ) d ON d.user_id = b.user_id
        LEFT JOIN (
            SELECT o.user_id, CAST(sum(o.tokens_reserved - o.tokens_covered) AS bigint) AS tokens
            FROM trueup.hold o WHERE o.status = 'open' GROUP BY 1
        ) h ON h.user_id = b.user_id
        WHERE true{{ within("b.user_id") }}
    ) compared
    WHERE is_current AND seen <> expected OR held <> in_holds
    ORDER BY user_id
"""
_ANOMALIES = """
    SELECT * FROM trueup.anomalies(CAST(:after AS {user_id_type}), CAST(:last AS {user_id_type}),
                                  CAST(:since AS timestamptz), :most)
"""
_REPAIR = """
    SELECT trueup.repair_balance(:run_id, CAST(:user_id AS {user_id_type}))
"""
_NOTE = """
    SELECT trueup.note_defect(:run_id, :kind, CAST(:user_id AS {user_id_type}), :seen, :expected, :repaired,
                              CAST(:detail AS jsonb))
"""


def find_balance_mismatches(
    connection: Connection, mapping: HostMapping, after: UserId | None, last: UserId | None
) -> list[Defect]:
    """Return the balances that differ from the log or from their open holds. Writes nothing.

    The range is the users after `after`, up to and including `last`; None: no bound.
    """
    statement = render_statement(_MISMATCHES, mapping, within=conditions_of(after, last))
    found = []
    for row in connection.execute(statement, bounds(after, last)):
        if row.is_current and row.seen != row.expected:
            found.append(Defect(kind="balance_untrue", user_id=row.user_id, seen=row.seen, expected=row.expected))
        if row.held != row.in_holds:
            found.append(Defect(kind="held_untrue", user_id=row.user_id, seen=row.held, expected=row.in_holds))
    return found


_UNCOUNTABLE = """
    SELECT user_id FROM trueup.balance
    WHERE user_id = ANY (CAST(:user_ids AS {user_id_type}[])) AND consumed >= :uncountable ORDER BY user_id
"""


def find_uncountable(connection: Connection, user_id_type: UserIdType, user_ids: Sequence[UserId]) -> list[Defect]:
    """Return a defect for each of these users whose log rows add up to more than can be counted. Writes nothing."""
    statement = text(_UNCOUNTABLE.format(user_id_type=user_id_type))
    found = connection.scalars(statement, {"user_ids": list(user_ids), "uncountable": UNCOUNTABLE})
    return [
        Defect(kind="usage_uncountable", user_id=user_id, detail={"remedy": UNCOUNTABLE_REMEDY}) for user_id in found
    ]


def find_anomalies(
    connection: Connection, user_id_type: UserIdType, after: UserId | None, last: UserId | None
) -> list[Defect]:
    """Return the defects in a range that only a person can repair. Writes nothing.

    The range is the users after `after`, up to and including `last`; None: no bound.
    """
    newest = connection.scalar(
        text("SELECT max(started_at) FROM trueup.reconcile_run WHERE kind = 'deep' AND status = 'finished'")
    )
    since = newest - CHARGES_SINCE_MARGIN if isinstance(newest, datetime) else None
    statement = text(_ANOMALIES.format(user_id_type=user_id_type))
    rows = connection.execute(statement, {"after": after, "last": last, "since": since, "most": MAX_ANOMALIES})
    return [
        Defect(kind=row.kind, user_id=row.user_id, seen=row.seen, expected=row.expected, detail=row.detail)
        for row in rows
    ]


def find_installation_defects(connection: Connection) -> list[Defect]:
    """Return the defects that belong to no user. Writes nothing.

    They are missing or disabled triggers, partitions without triggers, deltas that no balance will include, and holds
    past their expiry.
    """
    found = [
        Defect(kind="trigger_idle", detail={"trigger": row.name, "state": row.state})
        for row in connection.execute(text("SELECT * FROM trueup.disabled_triggers()"))
    ]
    found += find_uncovered_partitions(connection)
    lost = connection.scalar(text("SELECT trueup.count_lost_deltas()"))
    if lost:
        found.append(Defect(kind="deltas_without_subscription", seen=lost, expected=0))
    overdue = connection.scalar(
        text("SELECT count(*) FROM trueup.hold WHERE status = 'open' AND expires_at <= clock_timestamp() - :after"),
        {"after": OVERDUE_AFTER},
    )
    if overdue:
        found.append(Defect(kind="holds_overdue", seen=overdue, expected=0))
    return found


_UNCOVERED = text(
    """
    SELECT u.partition
    FROM (SELECT CAST(CAST(id AS regclass) AS text) AS partition FROM trueup.log_partitions() WHERE NOT covered) u
    WHERE NOT EXISTS (SELECT FROM trueup.defect f
                      WHERE f.kind = 'partition_uncovered' AND f.detail->>'partition' = u.partition
                        AND f.found_at > clock_timestamp() - CAST(:reported_within AS interval))
    ORDER BY 1
    """
)


def find_uncovered_partitions(connection: Connection, *, reported_within: timedelta = timedelta(0)) -> list[Defect]:
    """Return the log's partitions without trueup's triggers, unless a run reported them within `reported_within`."""
    found = connection.scalars(_UNCOVERED, {"reported_within": reported_within})
    return [Defect(kind="partition_uncovered", detail={"partition": partition}) for partition in found]


def repair_balance(connection: Connection, user_id_type: UserIdType, run_id: int, user_id: UserId) -> int:
    """Repair a user's balance under its lock. Returns how many defects it had then, which may be none."""
    statement = text(_REPAIR.format(user_id_type=user_id_type))
    noted: int = connection.execute(statement, {"run_id": run_id, "user_id": user_id}).scalar_one()
    return noted


def repair_installation(connection: Connection, user_id_type: UserIdType, run_id: int, found: Sequence[Defect]) -> int:
    """Repair the defects that can be repaired, and record all of them. Returns how many were recorded."""
    noted = 0
    for defect in found:
        repaired = True
        if defect.kind == "deltas_without_subscription":
            connection.execute(text("SELECT trueup.delete_lost_deltas()"))
        elif defect.kind == "holds_overdue":
            while expire_holds(connection)[0]:
                pass
        else:
            repaired = False
        noted += note_defect(connection, user_id_type, run_id, defect, repaired=repaired)
    return noted


def note_defect(
    connection: Connection, user_id_type: UserIdType, run_id: int, defect: Defect, *, repaired: bool = False
) -> int:
    """Record a defect, once in a run. Returns 1, or 0 if the run has recorded it already."""
    noted = connection.scalar(
        text(_NOTE.format(user_id_type=user_id_type)),
        {
            "run_id": run_id,
            "kind": defect.kind,
            "user_id": defect.user_id,
            "seen": defect.seen,
            "expected": defect.expected,
            "repaired": repaired,
            "detail": json.dumps(defect.detail),
        },
    )
    return noted or 0


def read_defects(connection: Connection, user_id_type: UserIdType, run_id: int, *, limit: int = 1000) -> list[Defect]:
    """Return the defects that a run found, oldest first, at most `limit`."""
    table = own_table("defect", user_id_type)
    rows = connection.execute(table.select().where(table.c.run_id == run_id).order_by(table.c.id).limit(limit))
    names = ("kind", "user_id", "seen", "expected", "repaired", "detail")
    return [Defect(**{name: getattr(row, name) for name in names}) for row in rows]
