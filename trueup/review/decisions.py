"""What people decide about drifts: the list of those that wait for it, accept, grant, ignore, and undoing a run."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, text

from trueup.accounts.grants import as_utc, check_text
from trueup.accounts.user_ids import UserId
from trueup.errors import InvalidInputError, TrueupError
from trueup.host.mapping import UserIdType

Choice = Literal["accept", "grant", "ignore"]


class DecisionRefusedError(TrueupError):
    """The drift can't be decided so, or not any more. Nothing was written."""


@dataclass(frozen=True, kw_only=True)
class ReviewFilter:
    """Which of the drifts that wait for a person: those of exactly these causes, all of them together; off by so many
    tokens at most; found first by this run. None or empty: whatever it is.
    """

    causes: tuple[str, ...] = ()
    max_tokens: int | None = None
    run_id: int | None = None

    def values(self) -> dict[str, Any]:
        """Return them as the statements' parameters."""
        return {"causes": list(self.causes) or None, "max_tokens": self.max_tokens, "run": self.run_id}


@dataclass(frozen=True, kw_only=True)
class ReviewItem:
    """A drift that waits for a person. Token figures are counts.

    `tokens`: by how much the counter is off, positive when it is too high. `counter` (None: null) and `expected` are of
    now. `changed`: the difference is another one by now, so that it has to be found anew before it can be decided.
    `tokens_to_grant`: what the choice "grant" would give; None when there is nothing to grant.
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
    """A decision as it was written. Counters None: null. `already`: it had been made before, by `by` at `decided_at`.

    `grant_id` and `tokens_granted`: only of the choice "grant".
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
    """`counters`: how many were put back. `left`: those somebody has written since, or is writing now."""

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
    """Return the drifts that wait for a person, longest first.

    `user_id` None: of all users. `only` None: all. `now` None: the database's.
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
    """Decide about a drift that waits for a person; atomic by itself, and safe to repeat.

    "accept": set the counter right. "grant": give what the counter shows too much as a grant, with `reference` and
    optionally `expires_at`. "ignore": leave this difference alone while it stays the same in this window.
    Raises `InvalidInputError`, or `DecisionRefusedError` if the drift is not in review, or not as it was found.
    """
    if choice == "grant" and reference is None:
        raise InvalidInputError("reference: a grant needs one, such as a payment's number; it grants once.")
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
    """Put the counters that a run corrected back to what it had seen, where nobody has written since.

    In batches, each its own transaction: `connection` is one of `db.connect()`. May be repeated, and goes on then.
    The next run holds these counters for review, until a person decides or the window moves.
    Raises `DecisionRefusedError` for a run that is not there or still at work.
    """
    values: dict[str, Any] = {"run": run_id, "by": check_text("by", by), "note": check_text("note", note)}
    status = connection.scalar(_RUN_STATUS, {"run": run_id})
    if status is None:
        raise DecisionRefusedError(f"There is no run {run_id}. Nothing was undone. `trueup drift history` lists them.")
    if status == "running":
        raise DecisionRefusedError(f"Run {run_id} is still at work. Nothing was undone. Wait for it to end.")
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
    """Say why, and what to do."""
    again = f"`trueup reconcile --user {row.drift_user}` finds it as it is now."
    match row.outcome:
        case "unknown":
            return "there is none of that number. `trueup drift review` lists those that wait."
        case "not_in_review":
            return f"it does not wait for a person: it was {row.decision}. `trueup drift review` lists those that do."
        case "decided_otherwise":
            return f"{row.decided_by} has decided {row.decision!r} at {row.decided_at:%Y-%m-%d %H:%M:%S} already."
        case "superseded":
            return f"drift {row.newer_drift} of user {row.drift_user} has come after it. See `trueup drift review`."
        case "gone":
            return f"user {row.drift_user} has no such subscription any more."
        case "busy":
            return "the application is writing this counter now. Try again."
        case "changed":
            counter = "null" if row.counter is None else row.counter
            return f"the counter is {counter} and should be {row.expected} by now, which is another difference. {again}"
        case "out_of_range":
            return f"the counter's column can't hold {row.counter_after}."
        case "nothing_to_grant":
            return "the counter is too low: there is nothing to grant. `trueup drift accept` sets it right."
        case "grant_past":
            return "the grant would have expired already. Give a later --expires."
        case _:
            return f"reference {reference!r} was granted before (grant {row.grant_id}). See `trueup tokens grants`."
