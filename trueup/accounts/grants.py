"""Grants: tokens on top of a plan, given once per reference, with an optional expiry; used in the order that
`trueup/accounts/grants.sql` tells.

A grant pays for nothing that a plan has paid for, so that none of its tokens goes by windows or plans that trueup did
not look at: the host's own writes tell of each, and each window is held against the plans that it was used under.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import MAX_TOKENS
from trueup.errors import InvalidInputError, TrueupError, UnknownUserError

# An index row, which a reference is part of, holds no more than 2 700 bytes.
MAX_CHARACTERS = 500


class GrantRefusedError(TrueupError):
    """The grant can't be given or taken back as asked. Nothing was written."""


@dataclass(frozen=True, kw_only=True)
class Grant:
    """One grant. `tokens`: what it gave; `tokens_used`: what it has paid for; `tokens_left`: what it still adds.

    `reference` None: it was given by hand in the database. `expires_at` None: never. `revoked_at` None: it was not.
    `status`: live, expired, revoked, or later (it has not begun).
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
    """`already`: the same had been granted under this reference before, and nothing was added."""

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
    """Give a user tokens on top of the plan, once per reference; atomic by itself, and safe to repeat.

    `expires_at` None: never; without a time zone it is UTC. `now` None: the database's clock.
    Raises `InvalidInputError`, `UnknownUserError`, or `GrantRefusedError` if the reference has granted something else.
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
            raise InvalidInputError(f"expires: {expires_at} is not in the future. Nothing was granted.")
        case "revoked":
            raise GrantRefusedError(
                f"reference: {reference!r} was granted to user {user_id} and revoked (grant {row.grant_id}). "
                "Nothing was granted. Give another reference."
            )
        case _:
            raise GrantRefusedError(
                f"reference: {reference!r} stands for grant {row.grant_id} of user {user_id}, with other tokens or "
                f"another expiry. Nothing was granted. See `trueup tokens grants {user_id}`, or give another reference."
            )


def revoke_grant(
    connection: Connection, user_id: UserId, grant_id: int, *, reason: str, by: str, now: datetime | None = None
) -> int | None:
    """Take back what a grant has left; what it has paid for stays paid. Atomic by itself.

    Returns the tokens taken back, None if it was revoked before. `now` None: the database's clock.
    Raises `InvalidInputError`, or `GrantRefusedError` for a grant that is not there or has expired.
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
            f"User {user_id} has no grant {grant_id}. Nothing was revoked. `trueup tokens grants {user_id}` lists them."
        )
    if row.outcome == "ended":
        raise GrantRefusedError(f"Grant {grant_id} has expired: there is nothing left to take back.")
    return None if row.outcome == "already" else row.tokens


def list_grants(connection: Connection, user_id: UserId, *, now: datetime | None = None) -> list[Grant]:
    """Return a user's grants, newest first. `now` None: the database's clock."""
    return [_grant(row) for row in connection.execute(_LIST, {"user": user_id, "now": now})]


def check_tokens(tokens: Any) -> int:
    """Return the tokens of a grant. Raises `InvalidInputError` unless they are a whole number from 1 on."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= MAX_TOKENS:
        raise InvalidInputError(
            f"tokens: {tokens!r} is no size of a grant. Give a whole number from 1 to {MAX_TOKENS}."
        )
    return tokens


def check_text(field: str, value: str) -> str:
    """Return a text that people gave, without spaces around it. Raises `InvalidInputError` for an empty one."""
    if not value.strip() or "\x00" in value:
        raise InvalidInputError(f"{field}: {value!r} says nothing. Give a text, for the audit.")
    if len(value) > MAX_CHARACTERS or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InvalidInputError(f"{field}: give at most {MAX_CHARACTERS} characters of Unicode text.")
    return value.strip()


def as_utc(moment: datetime | None) -> datetime | None:
    """Return a time with its zone; one that names none is UTC."""
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


def _grant(row: Any) -> Grant:
    return Grant(**{name: getattr(row, name) for name in Grant.__dataclass_fields__})
