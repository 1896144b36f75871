"""Bulk decisions: decide about all drifts that a filter selects. Each is decided and audited like a single drift."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from trueup.accounts.grants import check_text
from trueup.database.driver_errors import REFUSED
from trueup.errors import InvalidInputError
from trueup.host.mapping import UserIdType
from trueup.review.decisions import Choice, ReviewFilter

# The gates of a batch's users wait until the whole batch is decided.
DECIDED_AT_ONCE = 50
PAGE_SIZE = 5_000
MAX_CHOSEN = 10_000_000


@dataclass(frozen=True, kw_only=True)
class ChosenDrifts:
    """The drifts in review that a filter selected when they were counted; later drifts are not included.

    `tokens_overstated`: the sum by which counters are too high; `tokens_understated`: too low. `last_id`: the highest
    id among them; None: there are none.
    """

    only: ReviewFilter
    drifts: int
    tokens_overstated: int
    tokens_understated: int
    last_id: int | None


@dataclass(kw_only=True)
class BulkDecision:
    """The result of a bulk decision. `decided`: number of decided drifts.

    `left`: number of undecided drifts by reason, an `outcome` of `trueup.decide_drift`, or "refused" if the database
    refused the new counter.
    """

    decided: int = 0
    left: Counter[str] = field(default_factory=Counter)


def choose_drifts(
    connection: Connection, user_id_type: UserIdType, only: ReviewFilter, *, limit: int = MAX_CHOSEN
) -> ChosenDrifts:
    """Count the drifts in review that match the filter, the oldest ones if there are more than `limit`."""
    row = connection.execute(text(_CHOSEN.format(user_id_type=user_id_type)), {**only.values(), "limit": limit}).one()
    return ChosenDrifts(only=only, **row._mapping)


def decide_chosen(
    connection: Connection,
    user_id_type: UserIdType,
    chosen: ChosenDrifts,
    choice: Choice,
    *,
    by: str,
    note: str,
    progress: Callable[[int], None] = lambda _done: None,
) -> BulkDecision:
    """Make the same decision about all chosen drifts, in small batches, each in its own transaction.

    `connection`: one on which each statement is its own transaction. A drift that has changed since it was found stays
    undecided. A repeated call continues where the last one stopped. `choice`: "accept" or "ignore". `by`, `note`: who
    decides and why. `progress`: called after each batch with the number of drifts processed.
    Raises `InvalidInputError`, also for the choice "grant", which needs a reference for each drift.
    """
    if choice == "grant":
        raise InvalidInputError(
            "choice: each grant needs its own reference, so nothing was decided. Use `trueup drift grant` for each one."
        )
    values = {"choice": choice, "by": check_text("by", by), "note": check_text("note", note)}
    outcome, after, done = BulkDecision(), 0, 0
    page = text(_PAGE.format(user_id_type=user_id_type))
    bounds = {**chosen.only.values(), "last": chosen.last_id or 0, "limit": PAGE_SIZE}
    while rows := connection.execute(page, bounds | {"after": after}).all():
        after = rows[-1].id
        for start in range(0, len(rows), DECIDED_AT_ONCE):
            batch = rows[start : start + DECIDED_AT_ONCE]
            for result in _decide(connection, user_id_type, batch, values):
                if result in ("decided", "already"):
                    outcome.decided += 1
                else:
                    outcome.left[result] += 1
            done += len(batch)
            progress(done)
    # Drifts that another person has decided since they were counted.
    outcome.left["decided_otherwise"] += max(0, chosen.drifts - done)
    outcome.left = +outcome.left
    return outcome


def _decide(
    connection: Connection, user_id_type: UserIdType, rows: Sequence[Any], values: dict[str, Any]
) -> Sequence[str]:
    ids = {"ids": [row.id for row in rows], "users": [row.user_id for row in rows]}
    try:
        return connection.scalars(text(_DECIDE.format(user_id_type=user_id_type)), ids | values).all()
    except DBAPIError as error:
        if not isinstance(error.orig, REFUSED):
            raise
        connection.rollback()
    if len(rows) == 1:
        return ["refused"]
    # A host's constraint on one counter must not prevent the decisions about the others.
    return [result for row in rows for result in _decide(connection, user_id_type, [row], values)]


_DRIFTS = """
    trueup.undecided_drifts(
        CAST(NULL AS {user_id_type}), CAST(:causes AS text[]), CAST(:max_tokens AS bigint), CAST(:run AS bigint))
"""
_CHOSEN = f"""
    SELECT count(*) AS drifts, max(c.id) AS last_id,
           coalesce(sum(greatest(c.off_by, 0)), 0)::bigint AS tokens_overstated,
           coalesce(sum(greatest(-c.off_by, 0)), 0)::bigint AS tokens_understated
    FROM (SELECT t.id, trueup.off_by(t) AS off_by FROM {_DRIFTS} t ORDER BY t.id LIMIT :limit) c
"""
_PAGE = f"""
    SELECT t.id, t.user_id FROM {_DRIFTS} t WHERE t.id > :after AND t.id <= :last ORDER BY t.id LIMIT :limit
"""
# In the order of users, so that two concurrent bulk decisions don't deadlock.
_DECIDE = """
    SELECT r.outcome
    FROM (SELECT w.id FROM unnest(CAST(:ids AS bigint[]), CAST(:users AS {user_id_type}[])) AS w (id, user_id)
          ORDER BY w.user_id, w.id) w
    CROSS JOIN LATERAL trueup.decide_drift(w.id, :choice, :by, :note, NULL, NULL, NULL) r
"""
