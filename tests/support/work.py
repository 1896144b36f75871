"""trueup's own work as tasks do it, with defaults for the arguments that a test does not vary."""

import itertools
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from trueup.gate.holds import Hold, open_hold
from trueup.usage.charges import Charge, Usage, record_charge

_numbers = itertools.count(1)

OWNER = "test:1"


def hold_tokens(
    connection: Connection,
    user: Any,
    tokens: int = 1_000,
    *,
    task: str | None = None,
    lease: float = 0,
    ttl: int = 600,
    request: str = "",
    fresh_retries: int = 0,
    retries: int = 0,
    waits: int = 0,
    now: datetime | None = None,
) -> Hold:
    """Open a hold. `task` None: of a new task. `lease` 0: the next attempt may take it over at once."""
    return open_hold(
        connection,
        user_id=user,
        task_id=task or f"task-{next(_numbers)}",
        feature_name="Test",
        section="chat",
        estimated_tokens=tokens,
        owner=OWNER,
        lease_seconds=lease,
        ttl_seconds=ttl,
        request=request,
        fresh_retries=fresh_retries,
        retries=retries,
        waits=waits,
        now=now,
    )


def usage_of(tokens: int, **more: Any) -> Usage:
    figures = {"prompt_tokens": tokens // 2, "completion_tokens": tokens - tokens // 2, "total_tokens": tokens}
    return Usage(**{**figures, "response_time_ms": 5, "model_name": "test-model", **more})


def charge_tokens(
    connection: Connection, hold: Hold, tokens: int, *, key: str = "1", now: datetime | None = None, **more: Any
) -> Charge:
    return record_charge(connection, hold, call_key=key, usage=usage_of(tokens), now=now, **more)


def balance(host: Any, user: Any) -> tuple[int, int]:
    """Return the balance row's (consumed, held), without deltas."""
    row = host.execute("SELECT consumed, held FROM trueup.balance WHERE user_id = :user", user=user).one()
    return row.consumed, row.held
