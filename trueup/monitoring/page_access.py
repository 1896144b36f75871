"""Who may open the live page: one-time login links, and the sessions that links and tokens open.

The database has only the fingerprint of each secret. A link opens one session: the statement that deletes it decides.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, text

from trueup.accounts.validation import check_text

LINK_LIVES = timedelta(minutes=10)
SESSION_LIVES = timedelta(hours=12)
_SECRET_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Session:
    """A session of the live page. `operator`: for the audit. `is_local`: only for browsers on the API's machine."""

    operator: str
    is_local: bool
    expires_at: datetime


def new_secret() -> str:
    """Return a random secret for a link or a session."""
    return secrets.token_urlsafe(_SECRET_BYTES)


def form_token(cookie: str) -> str:
    """Return the token of the forms that belong to a cookie. Another site can send the cookie, but not know this."""
    return hmac.new(cookie.encode(), b"trueup page form", hashlib.sha256).hexdigest()


_NOW = "coalesce(CAST(:now AS timestamptz), clock_timestamp())"
_PRUNE = text(f"DELETE FROM trueup.page_access WHERE expires_at <= {_NOW}")
_ADD = text(
    f"""
    INSERT INTO trueup.page_access (fingerprint, kind, operator, is_local, created_at, expires_at)
    VALUES (:fingerprint, :kind, :operator, :is_local, {_NOW}, least(CAST(:until AS timestamptz), {_NOW} + :lives))
    -- A retry of the same statement finds its own row.
    ON CONFLICT (fingerprint) DO UPDATE SET kind = excluded.kind
    RETURNING operator, is_local, expires_at
    """
)
# Two requests with one link: the second one waits for the first, and then finds no row.
_EXCHANGE = text(
    f"""
    WITH link AS (
        DELETE FROM trueup.page_access
        WHERE fingerprint = :link AND kind = 'link' AND expires_at > {_NOW} RETURNING operator
    )
    INSERT INTO trueup.page_access (fingerprint, kind, operator, is_local, created_at, expires_at)
    SELECT :session, 'session', link.operator, true, {_NOW}, {_NOW} + :lives FROM link
    RETURNING operator, is_local, expires_at
    """
)
_FIND = text(
    f"""
    SELECT operator, is_local, expires_at FROM trueup.page_access
    WHERE fingerprint = :fingerprint AND kind = 'session' AND expires_at > {_NOW}
    """
)
_END = text("DELETE FROM trueup.page_access WHERE fingerprint = :fingerprint AND kind = 'session'")


def make_link(connection: Connection, operator: str, *, now: datetime | None = None) -> str:
    """Return the secret of a new login link, which opens one session within `LINK_LIVES`.

    `operator`: whose decisions they will be. `now` None: the database's clock.
    """
    connection.execute(_PRUNE, {"now": now})
    secret = new_secret()
    values = {"kind": "link", "operator": check_text("by", operator), "is_local": True, "until": None}
    connection.execute(_ADD, {**values, "fingerprint": _fingerprint(secret), "lives": LINK_LIVES, "now": now})
    return secret


def use_link(connection: Connection, link: str, session: str, *, now: datetime | None = None) -> Session | None:
    """Use a login link up and open the session with that secret. None: the link is unknown, used or too old.

    `now` None: the database's clock.
    """
    values = {"link": _fingerprint(link), "session": _fingerprint(session), "lives": SESSION_LIVES, "now": now}
    return _one(connection, _EXCHANGE, values)


def open_session(
    connection: Connection, session: str, operator: str, *, until: datetime | None = None, now: datetime | None = None
) -> Session:
    """Open a session for an operator whose token was verified. `until`: when the token ends; None: `SESSION_LIVES`.

    `now` None: the database's clock.
    """
    connection.execute(_PRUNE, {"now": now})
    values = {"kind": "session", "operator": check_text("operator", operator), "is_local": False, "until": until}
    found = _one(connection, _ADD, {**values, "fingerprint": _fingerprint(session), "lives": SESSION_LIVES, "now": now})
    assert found is not None  # noqa: S101 - for the type checker: the statement returns its row
    return found


def find_session(connection: Connection, session: str, *, now: datetime | None = None) -> Session | None:
    """Return the open session with that secret; None: there is none. `now` None: the database's clock."""
    return _one(connection, _FIND, {"fingerprint": _fingerprint(session), "now": now})


def end_session(connection: Connection, session: str) -> None:
    """End a session at once. Idempotent."""
    connection.execute(_END, {"fingerprint": _fingerprint(session)})


def _fingerprint(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _one(connection: Connection, statement: Any, values: dict[str, Any]) -> Session | None:
    row = connection.execute(statement, values).mappings().one_or_none()
    return Session(**row) if row else None
