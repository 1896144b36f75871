"""One subscription for each user: with two, nobody knows which plan and window count."""

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
    """The host's tables are not fit: a user has more than one subscription.

    Nothing is admitted for this user; what was paid for is still recorded.
    """

    def __init__(self, user_id: UserId, place: str) -> None:
        self.user_id = user_id
        self.place = place
        super().__init__(user_id, place)  # the arguments, so that the error pickles

    def __str__(self) -> str:
        return (
            f"User {self.user_id} has several subscriptions in {self.place}, and nobody knows which one counts. "
            "Nothing is admitted for this user. Delete all but one, and give the column a unique index, or map a table "
            "with one row a user."
        )


def several_subscriptions(user_id: UserId) -> SeveralSubscriptionsError:
    """Return the error for a user that was found to have several."""
    names = get_settings().host.subscription
    return SeveralSubscriptionsError(user_id, f"{names.table}.{names.user_id}")


def refuse_several_subscriptions(connection: Connection, user_id: UserId) -> None:
    """Raise `SeveralSubscriptionsError` if the user has more than one."""
    if connection.scalar(_COUNT, {"user_id": user_id}) > 1:
        raise several_subscriptions(user_id)


def refuse_shared_users(connection: Connection, mapping: HostMapping) -> None:
    """Raise `NotInstalledError` if any user has several subscriptions now; warn if nothing keeps it so.

    A user without an id, which a host may allow, has no account and is passed over.
    """
    names = mapping.subscription
    if connection.scalar(_UNIQUE, {"table": quote_table(names.table), "column": names.user_id}):
        return
    users = list(connection.execute(render_statement(_SHARED, mapping), {"limit": _NAMED_USERS + 1}).scalars())
    place = f"{names.table}.{names.user_id}"
    if users:
        named = ", ".join(map(str, users[:_NAMED_USERS])) + (", and more" if len(users) > _NAMED_USERS else "")
        raise NotInstalledError(
            f"{place} names a user in several rows ({named}), and nobody knows which subscription counts. Nothing was "
            "changed. Delete all but one for each user, and give the column a unique index; or, where a user has one "
            "for each period, map a table with one row a user and the counter."
        )
    logger.warning(
        "%s has no unique index. A user with several subscriptions is refused by the gate: give the column one.", place
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
