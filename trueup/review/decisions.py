"""Decisions about drifts: list the drifts in review, decide about one of them, and undo a run's corrections.

A bulk decision is about all drifts that a filter selects. Each of them is decided and audited like a single drift.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from trueup.accounts.grants import as_utc
from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import check_text
from trueup.database.driver_errors import REFUSED
from trueup.errors import InvalidInputError, TrueupError
from trueup.host.mapping import UserIdType

Choice = Literal["accept", "grant", "ignore"]

# The gates of a batch's users wait until the whole batch is decided.
DECIDED_AT_ONCE = 50
PAGE_SIZE = 5_000
MAX_CHOSEN = 10_000_000


class DecisionRefusedError(TrueupError):
    """This decision about the drift is not possible, or no longer possible. Nothing was written."""


@dataclass(frozen=True, kw_only=True)
class ReviewFilter:
    """A filter on the drifts in review; an empty or None field matches all.

    `causes`: the drift has exactly these causes together. `max_tokens`: the counter is off by at most this many tokens.
    `run_id`: this run was the first to find the drift.
    """

    causes: tuple[str, ...] = ()
    max_tokens: int | None = None
    run_id: int | None = None

    def values(self) -> dict[str, Any]:
        """Return the parameters for the statements."""
        return {"causes": list(self.causes) or None, "max_tokens": self.max_tokens, "run": self.run_id}


@dataclass(frozen=True, kw_only=True)
class ReviewItem:
    """A drift in review. Token figures are counts.

    `tokens`: the difference when the drift was found, positive if the counter is too high. `counter` (None: null) and
    `expected`: the current values. `changed`: the current difference is another one, so that a reconcile run must find
    it again before it can be decided. `tokens_to_grant`: tokens that "grant" would give; None: nothing to grant.
    """

    id: int
    run_id: int
    user_id: UserId
    subscription_id: str
    tokens: int
    counter: int | None
    expected: int | None
    changed: bool
    tokens_to_grant: int | None
    cause: str
    certainty: str
    reason: str
    evidence: dict[str, Any]
    found_at: datetime
    last_seen_at: datetime


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A recorded decision. Counters None: null. `already`: `by` made the same decision before, at `decided_at`.

    `grant_id` and `tokens_granted` are None unless the choice is "grant".
    """

    drift_id: int
    user_id: UserId
    choice: str
    by: str
    decided_at: datetime
    counter_before: int | None
    counter_after: int | None
    grant_id: int | None
    tokens_granted: int | None
    already: bool


@dataclass(frozen=True, kw_only=True)
class Undone:
    """The result of undoing a run. `counters`: number of counters that were set back to their earlier values.

    `left`: number of counters that were not, because they were written or decided about since, or are locked now.
    """

    counters: int
    left: int


def list_reviews(
    connection: Connection,
    user_id_type: UserIdType,
    *,
    user_id: UserId | None = None,
    only: ReviewFilter | None = None,
    limit: int = 100,
    now: datetime | None = None,
) -> list[ReviewItem]:
    """Return the drifts in review, the oldest first, at most `limit`.

    `user_id` None: of all users. `only` None: no filter. `now` None: the database's clock.
    """
    statement = text(_REVIEW.format(user_id_type=user_id_type))
    values = {"user": user_id, **(only or ReviewFilter()).values(), "limit": limit, "now": now}
    rows = connection.execute(statement, values)
    return [_item(row) for row in rows]


def decide_drift(
    connection: Connection,
    drift_id: int,
    choice: Choice,
    *,
    by: str,
    note: str,
    reference: str | None = None,
    expires_at: datetime | None = None,
    now: datetime | None = None,
) -> Decision:
    """Decide about a drift in review, in one statement. Idempotent.

    "accept": correct the counter. "grant": give the tokens that the counter shows too much as a grant, with `reference`
    as its idempotency key and `expires_at` (None: no expiry). "ignore": accept the difference while it stays the same
    in this window. `by`, `note`: who decides and why. `now` None: the database's clock.
    Raises `InvalidInputError`, or `DecisionRefusedError` if the drift is not in review, or has changed since it was
    found.
    """
    if choice == "grant" and reference is None:
        raise InvalidInputError(
            "reference: a grant needs one, so nothing was written. Give a payment's number, for example. Each "
            "reference grants once."
        )
    values = {
        "drift": drift_id,
        "choice": choice,
        "by": check_text("by", by),
        "note": check_text("note", note),
        "reference": None if reference is None else check_text("reference", reference),
        "expires_at": as_utc(expires_at),
        "now": now,
    }
    row = connection.execute(_DECIDE, values).one()
    if row.outcome not in ("decided", "already"):
        raise DecisionRefusedError(f"Drift {drift_id}: {_refusal(row, reference)} Nothing was written.")
    return Decision(
        drift_id=drift_id,
        user_id=row.drift_user,
        choice=row.decision,
        by=row.decided_by,
        decided_at=row.decided_at,
        counter_before=row.counter,
        counter_after=row.counter_after,
        grant_id=row.grant_id,
        tokens_granted=row.tokens_granted,
        already=row.outcome == "already",
    )


def undo_run(
    connection: Connection, run_id: int, user_id_type: UserIdType, *, by: str, note: str, batch_size: int = 1000
) -> Undone:
    """Undo a run's corrections: set each counter back to the value before, unless it was written since.

    `connection`: one on which each statement is its own transaction; each batch of `batch_size` corrections is one. A
    repeated call continues where the last one stopped. The next run holds these counters for review, until a person
    decides or the window changes. `by`, `note`: who undoes the run and why.
    Raises `DecisionRefusedError` if the run does not exist or is in progress.
    """
    values: dict[str, Any] = {"run": run_id, "by": check_text("by", by), "note": check_text("note", note)}
    status = connection.scalar(_RUN_STATUS, {"run": run_id})
    if status is None:
        raise DecisionRefusedError(
            f"Run {run_id} does not exist. Nothing was undone. `trueup drift history` lists runs."
        )
    if status == "running":
        raise DecisionRefusedError(
            f"Run {run_id} is still in progress. Nothing was undone. Wait until it ends, then try again."
        )
    statement = text(_UNDO.format(user_id_type=user_id_type))
    counters, left = 0, 0
    after_user, after_id = None, None
    while True:
        batch = connection.execute(
            statement, values | {"after_user": after_user, "after_id": after_id, "limit": batch_size}
        ).one()
        counters += batch.undone
        left += batch.seen - batch.undone
        if batch.seen < batch_size:
            return Undone(counters=counters, left=left)
        after_user, after_id = batch.last_user, batch.last_id


_REVIEW = """
    SELECT (r.drift).id, (r.drift).run_id, (r.drift).user_id, (r.drift).subscription_id, r.off_by AS tokens, r.counter,
           r.expected, r.changed, (r.drift).cause, (r.drift).certainty, (r.drift).reason, (r.drift).evidence,
           (r.drift).found_at, (r.drift).last_seen_at,
           CASE WHEN r.off_by > 0 AND r.counter IS NOT NULL THEN r.off_by + r.overdraft END AS tokens_to_grant
    FROM trueup.drifts_in_review(
        CAST(:user AS {user_id_type}), CAST(:causes AS text[]), CAST(:max_tokens AS bigint), CAST(:run AS bigint),
        :limit, coalesce(CAST(:now AS timestamptz), clock_timestamp())) r
"""
_DECIDE = text("SELECT * FROM trueup.decide_drift(:drift, :choice, :by, :note, :reference, :expires_at, :now)")
_RUN_STATUS = text("SELECT status FROM trueup.reconcile_run WHERE id = :run")
_UNDO = """
    SELECT * FROM trueup.undo_corrections(:run, CAST(:after_user AS {user_id_type}), :after_id, :limit, :by, :note)
"""


def _item(row: Any) -> ReviewItem:
    return ReviewItem(**{name: getattr(row, name) for name in ReviewItem.__dataclass_fields__})


def _refusal(row: Any, reference: str | None) -> str:
    """Return why the decision was refused, and what to do."""
    again = f"Run `trueup reconcile --user {row.drift_user}` to find the current drift, then decide about that."
    match row.outcome:
        case "unknown":
            return "it does not exist. `trueup drift review` lists the drifts in review."
        case "not_in_review":
            return f"it is not in review; its action was {row.decision!r}. `trueup drift review` lists those in review."
        case "decided_otherwise":
            when = f"{row.decided_at:%Y-%m-%d %H:%M:%S}"
            return f"{row.decided_by} decided {row.decision!r} at {when}. That decision stays."
        case "superseded":
            return (
                f"drift {row.newer_drift} of user {row.drift_user} is newer and replaces it. Decide about that one if "
                "`trueup drift review` lists it."
            )
        case "gone":
            return f"user {row.drift_user} no longer has this subscription, so there is nothing to decide."
        case "busy":
            return "the application is writing this counter now. Try again."
        case "changed":
            counter = "null" if row.counter is None else row.counter
            return f"the counter is now {counter} and should be {row.expected}, which is another difference. {again}"
        case "out_of_range":
            return f"the counter's column cannot store {row.counter_after}. Give the column a larger type."
        case "nothing_to_grant":
            return "the counter is too low, so there is nothing to grant. `trueup drift accept` corrects it."
        case "grant_past":
            return "the grant would already be expired. Give a later --expires."
        case _:
            return (
                f"reference {reference!r} was granted before (grant {row.grant_id}), and each reference grants once. "
                "`trueup tokens grants` lists the grants."
            )


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
            for result in _decide_each(connection, user_id_type, batch, values):
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


def _decide_each(
    connection: Connection, user_id_type: UserIdType, rows: Sequence[Any], values: dict[str, Any]
) -> Sequence[str]:
    ids = {"ids": [row.id for row in rows], "users": [row.user_id for row in rows]}
    try:
        return connection.scalars(text(_DECIDE_EACH.format(user_id_type=user_id_type)), ids | values).all()
    except DBAPIError as error:
        if not isinstance(error.orig, REFUSED):
            raise
        connection.rollback()
    if len(rows) == 1:
        return ["refused"]
    # A host's constraint on one counter must not prevent the decisions about the others.
    return [result for row in rows for result in _decide_each(connection, user_id_type, [row], values)]


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
_DECIDE_EACH = """
    SELECT r.outcome
    FROM (SELECT w.id FROM unnest(CAST(:ids AS bigint[]), CAST(:users AS {user_id_type}[])) AS w (id, user_id)
          ORDER BY w.user_id, w.id) w
    CROSS JOIN LATERAL trueup.decide_drift(w.id, :choice, :by, :note, NULL, NULL, NULL) r
"""
