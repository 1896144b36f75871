"""Reads of a user's account in one round trip, without a lock."""

import math
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection, text

from trueup.accounts.host_connection import HostConnection
from trueup.accounts.subscriptions import several_subscriptions
from trueup.accounts.user_ids import UserId
from trueup.database.calls import call


@dataclass(frozen=True, kw_only=True)
class Account:
    """A user's subscription and tokens in one snapshot. Token figures are counts.

    `window_start` None: the window has no start. `end_date` None: unlimited. `counter`: as remaining tokens,
    whichever way the host counts; None: it is null. `right_counter`: the value that it should have; None: `remaining`.
    `unlimited`: the subscription has no limit, and its counter means nothing.
    `subscribed` False: the user has no subscription, and all figures are 0.
    """

    user_id: UserId
    subscribed: bool
    is_active: bool
    window_start: datetime | None
    end_date: datetime | None
    original: int
    consumed: int
    held: int
    counter: int | None
    now: datetime
    unlimited: bool = False
    right_counter: int | None = None

    @property
    def remaining(self) -> int:
        """max(0, original - consumed), as the specification defines it."""
        return max(0, self.original - self.consumed)

    @property
    def available(self) -> int:
        """The tokens that a new hold can reserve: max(0, original - consumed - held)."""
        return max(0, self.original - self.consumed - self.held)

    @property
    def days_remaining(self) -> int | None:
        return days_between(self.now, self.end_date)

    @property
    def drift(self) -> int | None:
        """The counter minus its right value. Positive: it shows used tokens. None: it is null, or there is no limit."""
        if self.counter is None or self.unlimited:
            return None
        return self.counter - (self.remaining if self.right_counter is None else self.right_counter)


SECONDS_A_DAY = 86_400


def days_between(now: datetime, end_date: datetime | None) -> int | None:
    """Return the full days until the end, at least 0. None: there is no end."""
    if end_date is None:
        return None
    return max(0, math.floor((end_date - now).total_seconds() / SECONDS_A_DAY))


# `at` NULL means the database's clock.
CLOCK = "clock AS (SELECT coalesce(CAST(:at AS timestamptz), clock_timestamp()) AS at)"
# Columns of a row `a` of trueup.accounts(); null for an unknown user.
# A window that begins at -infinity, or in a year that Python can't represent, has no start here.
# require_counted_lately() raises an error if the triggers do not count the host's writes: the figures would be wrong.
ACCOUNT_COLUMNS = """
           trueup.require_counted_lately() AS watched, clock.at AS now,
           a.subscription_id IS NOT NULL AS subscribed, a.is_active,
           CASE WHEN a.window_start >= '0001-01-03' AND a.window_start < '9999-12-31' THEN a.window_start END
               AS window_start,
           a.end_date, a.original, a.consumed, a.held, a.counter, a.plan_kind = 'unlimited' AS unlimited,
           trueup.right_counter(a.original, a.consumed) AS right_counter
"""

# The LEFT JOIN returns a row for an unknown user too.
_READ = text(
    f"""
    WITH {CLOCK}
    SELECT {ACCOUNT_COLUMNS},
           trueup.decide(a.subscription_id IS NOT NULL, a.is_active, a.end_date,
                         a.original, a.consumed, a.held, :estimate, clock.at) AS reason
    FROM clock LEFT JOIN LATERAL (
        SELECT * FROM trueup.accounts(clock.at) a WHERE a.user_id = :user_id) a ON true
    """
)


def read_account(connection: Connection, user_id: UserId, *, now: datetime | None = None) -> Account:
    """Return the user's account. `now`: None means the database's clock. Raises `SeveralSubscriptionsError`."""
    return read_decision(connection, user_id, 0, now=now)[0]


def read_decision(
    connection: Connection | HostConnection, user_id: UserId, estimated_tokens: int, *, now: datetime | None = None
) -> tuple[Account, str | None]:
    """Return the account and, from the same snapshot, the reason code why a task may not run (None: it may).

    `estimated_tokens`: the task's size, a count. `now`: as in `read_account`. Raises `SeveralSubscriptionsError`.
    """
    values = {"user_id": user_id, "estimate": estimated_tokens, "at": now}
    read = connection.execute if isinstance(connection, HostConnection) else partial(call, connection)
    row, *others = read(_READ, values)
    if others:
        raise several_subscriptions(user_id)
    return account_of(user_id, row), row.reason


def account_of(user_id: UserId, row: Any) -> Account:
    """Return the account from a row with `ACCOUNT_COLUMNS`."""
    return Account(
        user_id=user_id,
        subscribed=row.subscribed,
        is_active=bool(row.is_active),
        window_start=row.window_start,
        end_date=row.end_date,
        original=row.original or 0,
        consumed=row.consumed or 0,
        held=row.held or 0,
        counter=row.counter,
        unlimited=bool(row.unlimited),
        right_counter=row.right_counter,
        now=row.now,
    )
