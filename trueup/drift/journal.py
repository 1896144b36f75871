"""The journal of the counters: every change since trueup was attached. `trueup.append_window` writes it."""

from datetime import datetime, timedelta

from sqlalchemy import Connection, text

_PRUNE = text("SELECT trueup.prune_journal(coalesce(CAST(:now AS timestamptz), clock_timestamp()) - :age, :limit)")


def prune_journal(connection: Connection, *, older_than: timedelta, limit: int, now: datetime | None = None) -> int:
    """Delete entries older than `older_than` that a run has settled, at most `limit`. Returns how many.

    `now` None: the database's clock.
    """
    pruned: int = connection.execute(_PRUNE, {"age": older_than, "limit": limit, "now": now}).scalar_one()
    return pruned
