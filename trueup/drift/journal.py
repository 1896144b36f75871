"""The journal of the counters: every change since trueup was attached. `trueup.append_window` writes it."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.drift.detect import Drift
from trueup.drift.history import story_of
from trueup.drift.telling import Told, tell
from trueup.host.mapping import HostMapping

_STORY = text(
    """
    SELECT a.user_id, a.subscription_id, a.is_active, a.end_date, a.original, a.consumed, a.counter AS observed,
           trueup.right_counter(a.original, a.consumed) AS expected, trueup.right_counter(0, 1) < 0 AS counts_up,
           statement_timestamp() AS seen_at, s.story
    FROM trueup.accounts(statement_timestamp()) a
    CROSS JOIN LATERAL trueup.counter_stories(ARRAY[a.user_id], ARRAY[a.subscription_id], ARRAY[a.window_start],
                                              statement_timestamp()) s
    WHERE a.user_id = :user_id
    """
)


def tell_story(connection: Connection, mapping: HostMapping, user_id: UserId, *, most: int) -> list[Told]:
    """Return the newest `most` changes of a user's counter since it was last known, oldest first.

    Empty without a journal, or without a change.
    """
    row = connection.execute(_STORY, {"user_id": user_id}).first()
    if row is None:
        return []
    values: dict[str, Any] = dict(row._mapping)
    drift = Drift(**values)
    sizes = frozenset(connection.scalars(text("SELECT trueup.plan_sizes()")).all())
    document = {**values["story"], "min_age": 0, "payments_mapped": mapping.payment.table is not None}
    return tell(story_of(drift, document, sizes), most=most)


_PRUNE = text("SELECT trueup.prune_journal(coalesce(CAST(:now AS timestamptz), clock_timestamp()) - :age, :limit)")


def prune_journal(connection: Connection, *, older_than: timedelta, limit: int, now: datetime | None = None) -> int:
    """Delete entries older than `older_than` that a run has settled, at most `limit`. Returns how many.

    `now` None: the database's clock.
    """
    pruned: int = connection.execute(_PRUNE, {"age": older_than, "limit": limit, "now": now}).scalar_one()
    return pruned
