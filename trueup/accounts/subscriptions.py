"""Each user may have one subscription. With two, it is unknown which plan and window count."""

import logging

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.errors import NotInstalledError
from trueup.host.mapping import HostMapping, quote_table
from trueup.host.sql import render_statement
from trueup.settings.settings import get_settings

logger = logging.getLogger(__name__)

_NAMED_USERS = 5


class SeveralSubscriptionsError(NotInstalledError):
    """A user has more than one subscription in the host's tables.

    The gate admits no task of this user. Paid usage is still recorded.
    """

    def __init__(self, user_id: UserId, place: str) -> None:
        self.user_id = user_id
        self.place = place
        super().__init__(user_id, place)  # pickle needs the arguments

    def __str__(self) -> str:
        return (
            f"User {self.user_id} has several subscriptions in {self.place}, so it is unknown which one counts. No "
            "task of this user is admitted. Delete all but one and add a unique index to the column, or map a table "
            "with one row per user."
        )


def several_subscriptions(user_id: UserId) -> SeveralSubscriptionsError:
    """Return the error for a user with several subscriptions."""
    names = get_settings().host.subscription
    return SeveralSubscriptionsError(user_id, f"{names.table}.{names.user_id}")


def refuse_several_subscriptions(connection: Connection, user_id: UserId) -> None:
    """Raise `SeveralSubscriptionsError` if the user has more than one."""
    if connection.scalar(_COUNT, {"user_id": user_id}) > 1:
        raise several_subscriptions(user_id)


def refuse_shared_users(connection: Connection, mapping: HostMapping) -> None:
    """Raise `NotInstalledError` if a user has several subscriptions; warn if no unique index prevents it.

    Rows without a user id are ignored.
    """
    names = mapping.subscription
    if connection.scalar(_UNIQUE, {"table": quote_table(names.table), "column": names.user_id}):
        return
    users = list(connection.execute(render_statement(_SHARED, mapping), {"limit": _NAMED_USERS + 1}).scalars())
    place = f"{names.table}.{names.user_id}"
    if users:
        named = ", ".join(map(str, users[:_NAMED_USERS])) + (", and more" if len(users) > _NAMED_USERS else "")
        raise NotInstalledError(
            f"Users have more than one row in {place} ({named}), so it is unknown which subscription counts. Nothing "
            "was changed. Delete all but one row for each user and add a unique index to the column. If the host keeps "
            "one row per period, map a table with one row per user and the counter."
        )
    logger.warning(
        "column has no unique index, the gate refuses users with several subscriptions: add one column=%s", place
    )


_COUNT = text("SELECT count(*) FROM trueup.entitlements(clock_timestamp()) e WHERE e.user_id = :user_id")

_UNIQUE = text(
    """
    SELECT EXISTS (
        SELECT FROM pg_index i
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = to_regclass(:table) AND a.attname = :column
          AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indpred IS NULL)
    """
)

_SHARED = """
    SELECT s.{{ subscription.user_id }} FROM {{ subscription }} s
    WHERE s.{{ subscription.user_id }} IS NOT NULL
    GROUP BY 1 HAVING count(*) > 1 ORDER BY 1 LIMIT :limit
"""
