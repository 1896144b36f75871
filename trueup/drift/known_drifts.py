"""Earlier findings and decisions about drifted counters: is a drift new, and which of them limit the verdict?"""

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
from trueup.settings.policies import PAID_CAUSES

# A drift with one of these actions keeps its row when it is found again. Corrections and lost races are events: each
# gets a row.
_KEEPS_ITS_ROW = frozenset({"review", "reported", "ignored", "tolerated", "waiting"})


@dataclass(frozen=True, kw_only=True)
class Past:
    """A user's newest drift row, if the previous run saw it, and people's decisions in this period.

    `off_by`: the row's difference in tokens, without those in flight. `decision` None: there is no decision about the
    row. `row_id` None: there is no row.
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
        """Return the part that the verdict depends on.

        `min_age_seconds`: how old equal figures must be to count as unchanged.
        """
        unchanged = (
            self._same_figures(drift)
            and self.found_at is not None
            and now - self.found_at >= timedelta(seconds=min_age_seconds)
        )
        waits = self.action == "review" and ((self.off_by or 0) > 0 or self.reason == HELD)
        held = self.decision is None and (waits or self._may_be_paid())
        # If a new period has begun since, the held tokens are no longer in this counter.
        known_at = drift.evidence.base.moment
        over = known_at is not None and self.found_at is not None and self.found_at < known_at
        return History(unchanged=unchanged, held=held and not over, ignored=self.ignored, undone=self.undone)

    def known_row_id(self, drift: Drift, explanation: Explanation, verdict: Verdict) -> int | None:
        """Return the row that records this drift already; None: the drift is new.

        It is the same drift if the difference is the same: usage lowers both figures. A drift that waits for
        decrements must have the same figures too: the next request in flight may be as large as the last one.
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

    def _may_be_paid(self) -> bool:
        """Return whether the row only reports a surplus that may be paid tokens: no machine may take them later."""
        causes = frozenset((self.cause or "").split("+"))
        return self.action == "reported" and (self.off_by or 0) > 0 and bool(causes & PAID_CAUSES)

    def _same_figures(self, drift: Drift) -> bool:
        return self.row_id is not None and (self.observed, self.expected) == (drift.observed, drift.expected)


def read_past(connection: Connection, user_ids: Sequence[UserId], user_id_type: UserIdType) -> dict[UserId, Past]:
    """Return the past of each of these users."""
    past: dict[UserId, Past] = {user_id: Past() for user_id in user_ids}
    if past:
        statement = text(f"SELECT * FROM trueup.drift_past(CAST(:user_ids AS {user_id_type}[]))")
        for row in connection.execute(statement, {"user_ids": list(user_ids)}).mappings().all():
            values: dict[str, Any] = {**row, "ignored": frozenset(row["ignored"] or ())}
            user_id = values.pop("user_id")
            past[user_id] = Past(**values)
    return past
