"""Deciding about many drifts at once: those that a person chose, each decided and audited as one alone would be."""

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

# The users of a batch wait at the gate until all of it is decided.
DECIDED_AT_ONCE = 50
PAGE_SIZE = 5_000
MAX_CHOSEN = 10_000_000


@dataclass(frozen=True, kw_only=True)
class ChosenDrifts:
    """The drifts that wait for a person and that a filter chose, as they were counted; later ones are not among them.

    `tokens_overstated`: by how much their counters are too high together, `tokens_understated`: too low.
    `last_id` None: there are none.
    """

    only: ReviewFilter
    drifts: int
    tokens_overstated: int
    tokens_understated: int
    last_id: int | None


@dataclass(kw_only=True)
class BulkDecision:
    """`decided`: how many drifts. `left`: how many were not, by why not, in the words of `trueup.decide_drift`.

    "refused": the database would not take the counter.
    """

    decided: int = 0
    left: Counter[str] = field(default_factory=Counter)


def choose_drifts(
    connection: Connection, user_id_type: UserIdType, only: ReviewFilter, *, limit: int = MAX_CHOSEN
) -> ChosenDrifts:
    """Count the drifts that wait for a person and that the filter lets through, the first found at most `limit`."""
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
    """Decide the same about each of them, in small batches, each a transaction of its own.

    `connection` is one of `db.connect()`. What is not as it was found is left. May be repeated, and goes on then.
    `progress`: called after each batch with how many were looked at. Raises `InvalidInputError`.
    """
    if choice == "grant":
        raise InvalidInputError("choice: a grant needs a reference of its own. Grant one by one.")
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
    # What another has decided since it was counted.
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
    # The host's constraint on one counter must not keep the others from being decided.
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
# By user, so that two of these at once don't wait for each other in a circle.
_DECIDE = """
    SELECT r.outcome
    FROM (SELECT w.id FROM unnest(CAST(:ids AS bigint[]), CAST(:users AS {user_id_type}[])) AS w (id, user_id)
          ORDER BY w.user_id, w.id) w
    CROSS JOIN LATERAL trueup.decide_drift(w.id, :choice, :by, :note, NULL, NULL, NULL) r
"""
