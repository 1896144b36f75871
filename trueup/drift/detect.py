"""Find drifts: compare counters with balances, and gather the evidence from the host's rows. Read-only."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.drift.evidence import Evidence
from trueup.host.mapping import UserIdType
from trueup.host.sql import UNCOUNTABLE
from trueup.settings.policies import DEFAULT_MIN_AGE_SECONDS

_NO_EVIDENCE = Evidence()


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A counter that differs from the remaining tokens. All figures are tokens.

    `observed`: the counter's value, None if it is null. `expected`: max(0, original - consumed). `end_date` None:
    unlimited. `seen_at`: the time of the comparison, by the database's clock. `window`: the beginning of the period,
    as PostgreSQL prints it; "": not known. `counts_up`: the host's counter shows used tokens; `observed` is then
    original - counter, and `expected` is below 0 if the user has used too many. `plan_kind` "negative": the plan's
    figure is below 0, which may mean anything.
    """

    user_id: UserId
    subscription_id: str
    is_active: bool
    end_date: datetime | None
    original: int
    consumed: int
    observed: int | None
    expected: int
    seen_at: datetime
    window: str = ""
    counts_up: bool = False
    plan_kind: str | None = None
    evidence: Evidence = _NO_EVIDENCE

    @property
    def tokens(self) -> int:
        """observed - expected, a null counter as 0. Positive: the user is shown tokens that are gone."""
        return (self.observed or 0) - self.expected

    @property
    def figures(self) -> dict[str, Any]:
        """The figures that every explanation shows."""
        base = self.evidence.base
        return {"original": self.original, "consumed": self.consumed, "since": {"at": base.at, "kind": base.kind}}

    def written(self, remaining: int) -> int:
        """Return the value of the host's counter that shows so many remaining tokens."""
        return self.original - remaining if self.counts_up else remaining

    @property
    def is_negative(self) -> bool:
        """Whether the host's counter is below zero."""
        return self.observed is not None and self.written(self.observed) < 0

    @property
    def surplus(self) -> int:
        """observed - (original - consumed): the sum of all causes, with an overdraft not cut off at zero."""
        return (self.observed or 0) - (self.original - self.consumed)


# One statement, so that a drift and its evidence have one snapshot. Without a drift it reads only balances. It uses its
# own time: with an earlier clock reading, a row committed in between would seem to come after a correction that saw it.
_FIND = """
    WITH drifted AS MATERIALIZED (
        SELECT a.user_id, a.subscription_id, a.is_active, a.window_start, a.end_date, a.original, a.consumed,
               a.counter AS observed, trueup.right_counter(a.original, a.consumed) AS expected, a.plan_kind
        FROM trueup.accounts(statement_timestamp()) a
        WHERE a.user_id = ANY (CAST(:user_ids AS {user_id_type}[]))
          AND a.counter IS DISTINCT FROM trueup.right_counter(a.original, a.consumed)
          AND a.plan_kind IS DISTINCT FROM 'unlimited' AND NOT trueup.awaits_host(a.user_id)
          -- A counter whose usage can't be counted has no right value: a deep pass reports it.
          AND a.consumed < {uncountable}
    ), known AS (
        SELECT e.user_id, e.evidence FROM (
            SELECT array_agg(user_id) AS users, array_agg(subscription_id) AS subscriptions,
                   array_agg(window_start) AS windows, array_agg(original) AS original,
                   array_agg(consumed) AS consumed, array_agg(observed) AS observed
            FROM drifted HAVING count(*) > 0
        ) d, trueup.drift_evidence(d.users, d.subscriptions, d.windows, d.original, d.consumed, d.observed,
                                   statement_timestamp(), make_interval(secs => :min_age)) e
    )
    SELECT d.user_id, d.subscription_id, d.is_active, d.end_date, d.original, d.consumed, d.observed, d.expected,
           CAST(d.window_start AS text) AS window, statement_timestamp() AS seen_at, k.evidence, d.plan_kind,
           trueup.right_counter(0, 1) < 0 AS counts_up
    FROM drifted d LEFT JOIN known k ON k.user_id = d.user_id
    ORDER BY d.user_id
"""


def find_drifts(
    connection: Connection,
    user_ids: Sequence[UserId],
    user_id_type: UserIdType,
    *,
    min_age_seconds: float = DEFAULT_MIN_AGE_SECONDS,
) -> list[Drift]:
    """Return the drifts of these users' counters, ordered by user.

    `min_age_seconds`: the decrement of more recent usage may still arrive.
    """
    statement = text(_FIND.format(user_id_type=user_id_type, uncountable=UNCOUNTABLE))
    rows = connection.execute(statement, {"user_ids": list(user_ids), "min_age": min_age_seconds})
    return [_drift(row) for row in rows.all()]  # .all() calls the driver once, not for each row


def _drift(row: Any) -> Drift:
    values = dict(row._mapping)
    evidence, is_active = values.pop("evidence"), bool(values.pop("is_active"))
    known = Evidence.model_validate(evidence) if evidence else _NO_EVIDENCE
    return Drift(**values, is_active=is_active, evidence=known)
