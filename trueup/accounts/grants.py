"""Grants: tokens on top of a plan, given once per reference, with an optional expiry.

`grants.sql` defines the order in which they are used. A grant never pays for usage that a plan paid for. Triggers
record each change of a window or a plan, and each window is compared with the plans under which it was used, so changes
between two reads of trueup cost no granted token.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import check_estimate, check_text
from trueup.errors import InvalidInputError, TrueupError, UnknownUserError


class GrantRefusedError(TrueupError):
    """The grant can't be given or revoked as requested. Nothing was written."""


@dataclass(frozen=True, kw_only=True)
class Grant:
    """One grant. Counts: `tokens` granted, `tokens_used` for usage, `tokens_left` that it still adds to the budget.

    `reference` None: a person inserted it by hand. `expires_at` None: it never expires. `revoked_at` None: it was not
    revoked. `status`: live, expired, revoked, or later (it has not begun).
    """

    id: int
    user_id: UserId
    tokens: int
    tokens_used: int
    tokens_left: int
    status: str
    reason: str
    reference: str | None
    granted_at: datetime
    granted_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    revoked_by: str | None
    revoke_reason: str | None


@dataclass(frozen=True, kw_only=True)
class Granted:
    """The result of `grant_tokens`. `already`: the same grant existed under this reference, and nothing was added."""

    id: int
    already: bool


def grant_tokens(
    connection: Connection,
    user_id: UserId,
    tokens: int,
    *,
    reason: str,
    reference: str,
    by: str,
    expires_at: datetime | None = None,
    now: datetime | None = None,
) -> Granted:
    """Grant a user tokens on top of the plan, once per reference. One atomic statement, safe to repeat.

    `tokens`: a count from 1 on. `expires_at`: None means never; a time without a zone is UTC. `now`: None means the
    database's clock. Raises `InvalidInputError`, `UnknownUserError` for a user without a subscription, or
    `GrantRefusedError` if the reference has another grant.
    """
    values = {
        "user": user_id,
        "tokens": check_tokens(tokens),
        "reason": check_text("reason", reason),
        "reference": check_text("reference", reference),
        "by": check_text("by", by),
        "expires_at": as_utc(expires_at),
        "now": now,
    }
    row = connection.execute(_GRANT, values).one()
    match row.outcome:
        case "granted" | "already":
            return Granted(id=row.grant_id, already=row.outcome == "already")
        case "no_subscription":
            raise UnknownUserError(f"user: {user_id} has no subscription. Nothing was granted. Check the id.")
        case "past":
            raise InvalidInputError(
                f"expires: {expires_at} is not in the future. Nothing was granted. Give a later time."
            )
        case "revoked":
            raise GrantRefusedError(
                f"reference: grant {row.grant_id} of user {user_id} with the reference {reference!r} was revoked. "
                "Nothing was granted. Give another reference."
            )
        case _:
            raise GrantRefusedError(
                f"reference: {reference!r} belongs to grant {row.grant_id} of user {user_id}, with other tokens or "
                f"another expiry. Nothing was granted. Give another reference, or see `trueup tokens grants {user_id}`."
            )


def revoke_grant(
    connection: Connection, user_id: UserId, grant_id: int, *, reason: str, by: str, now: datetime | None = None
) -> int | None:
    """Revoke the unused tokens of a grant; usage that it has paid for stays paid. One atomic statement.

    `now`: None means the database's clock. Returns the count of revoked tokens, None if it was revoked before.
    Raises `InvalidInputError`, or `GrantRefusedError` for a grant that does not exist or has expired.
    """
    values = {
        "user": user_id,
        "grant": grant_id,
        "reason": check_text("reason", reason),
        "by": check_text("by", by),
        "now": now,
    }
    row = connection.execute(_REVOKE, values).one()
    if row.outcome == "unknown":
        raise GrantRefusedError(
            f"User {user_id} has no grant {grant_id}. Nothing was revoked. `trueup tokens grants {user_id}` lists the "
            "user's grants."
        )
    if row.outcome == "ended":
        raise GrantRefusedError(f"Grant {grant_id} has expired, so no tokens are left to revoke.")
    return None if row.outcome == "already" else row.tokens


def list_grants(connection: Connection, user_id: UserId, *, now: datetime | None = None) -> list[Grant]:
    """Return a user's grants, newest first. `now`: None means the database's clock."""
    rows = connection.execute(_LIST, {"user": user_id, "now": now})
    return [Grant(**{name: getattr(row, name) for name in Grant.__dataclass_fields__}) for row in rows]


def check_tokens(tokens: Any) -> int:
    """Return the count of tokens of a grant. Raises `InvalidInputError` if it is no integer of at least 1."""
    return check_estimate(tokens, "tokens", least=1)


def as_utc(moment: datetime | None) -> datetime | None:
    """Return a time with a zone. A time without one is UTC."""
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


_GRANT = text("SELECT * FROM trueup.grant_tokens(:user, :tokens, :reason, :reference, :expires_at, :by, :now)")
_REVOKE = text("SELECT * FROM trueup.revoke_grant(:user, :grant, :reason, :by, :now)")
_LIST = text(
    """
    WITH clock AS (SELECT coalesce(CAST(:now AS timestamptz), clock_timestamp()) AS at)
    SELECT g.*, u.used_before + u.used AS tokens_used,
           CASE WHEN u.ends > clock.at THEN u.rest - u.used ELSE 0 END AS tokens_left,
           CASE WHEN g.revoked_at <= clock.at THEN 'revoked' WHEN g.expires_at <= clock.at THEN 'expired'
                WHEN g.granted_at > clock.at THEN 'later' ELSE 'live' END AS status
    FROM clock
    CROSS JOIN LATERAL trueup.list_grants(:user, clock.at) u
    JOIN trueup.token_grant g ON g.user_id = :user AND g.id = u.id
    ORDER BY g.id DESC
    """
)
