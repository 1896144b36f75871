"""What was found and decided before about counters that differ now: is it the same drift, and may it be touched?"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.drift.action import HELD, History, Verdict, difference
from trueup.drift.causes import Explanation
from trueup.drift.detect import Drift
from trueup.host.mapping import UserIdType

# What is found again as it was; a correction or a lost race is an event, and written each time.
_KEEPS_ITS_ROW = frozenset({"review", "reported", "ignored", "tolerated", "waiting"})


@dataclass(frozen=True, kw_only=True)
class Past:
    """A user's newest drift row, if the run before this one saw it, and what people decided in this window.

    `off_by`: the difference that the row stands for, in tokens, without what was in flight. `decision` None: nobody
    decided about the row. `row_id` None: there is none.
    """

    row_id: int | None = None
    subscription_id: str | None = None
    observed: int | None = None
    expected: int | None = None
    off_by: int | None = None
    cause: str | None = None
    action: str | None = None
    decision: str | None = None
    found_at: datetime | None = None
    ignored: frozenset[int] = frozenset()
    undone: bool = False
    reason: str | None = None

    def history(self, drift: Drift, *, now: datetime, min_age_seconds: int) -> History:
        """Return what of it matters to the policy."""
        unchanged = (
            self._same_figures(drift)
            and self.found_at is not None
            and now - self.found_at >= timedelta(seconds=min_age_seconds)
        )
        held = self.action == "review" and self.decision is None and ((self.off_by or 0) > 0 or self.reason == HELD)
        # A new window has begun since: what was held is not in this counter any more.
        known_at = drift.evidence.base.moment
        over = known_at is not None and self.found_at is not None and self.found_at < known_at
        return History(unchanged=unchanged, held=held and not over, ignored=self.ignored, undone=self.undone)

    def known_row_id(self, drift: Drift, explanation: Explanation, verdict: Verdict) -> int | None:
        """Return the row that this drift stands in already; None: it is new.

        A user who goes on working lowers both figures, and the difference stays: that is the same drift. Only what
        waits must be the very same figures, for the next request in flight may be as large as the last one.
        """
        if self.row_id is None or verdict.write is not None or verdict.action not in _KEEPS_ITS_ROW:
            return None
        if self.subscription_id != drift.subscription_id or (self.observed is None) != (drift.observed is None):
            return None
        if verdict.action == "waiting":
            same = self.action == "waiting" and self._same_figures(drift)
        else:
            same = self.off_by == difference(drift, explanation.in_flight)
        if verdict.action == "ignored":
            return self.row_id if same and self.action == "ignored" else None
        undecided = self.decision is None and self.action == verdict.action and self.cause == explanation.cause
        return self.row_id if same and undecided else None

    def _same_figures(self, drift: Drift) -> bool:
        return self.row_id is not None and (self.observed, self.expected) == (drift.observed, drift.expected)


def read_past(connection: Connection, user_ids: Sequence[UserId], user_id_type: UserIdType) -> dict[UserId, Past]:
    """Return the past of each of these users."""
    past: dict[UserId, Past] = {user_id: Past() for user_id in user_ids}
    if past:
        statement = text(f"SELECT * FROM trueup.drift_past(CAST(:user_ids AS {user_id_type}[]))")
        for row in connection.execute(statement, {"user_ids": list(user_ids)}).all():
            past[row.user_id] = _past(row)
    return past


def _past(row: Any) -> Past:
    values = dict(row._mapping)
    values.pop("user_id")
    return Past(**values | {"ignored": frozenset(row.ignored or ())})
