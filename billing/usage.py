"""Rows of the AI usage log, as the host and trueup wrote them."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from billing.mapping import HostMapping, render_sql
from billing.users import UserId


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """One row of the log. `total_tokens` is a count; it counts against the budget only with `success`.

    `task_id` None: the row was written by the host.
    """

    log_id: str
    created_at: datetime
    section: str
    model_name: str
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    success: bool
    task_id: str | None


_LIST = """
    SELECT CAST(l.{{usage_log.id}} AS text) AS log_id, l.{{usage_log.created_at}} AS created_at,
           l.{{usage_log.section}} AS section, l.{{usage_log.model_name}} AS model_name,
           l.{{usage_log.prompt_tokens}} AS prompt_tokens, l.{{usage_log.completion_tokens}} AS completion_tokens,
           l.{{usage_log.total_tokens}} AS total_tokens, l.{{usage_log.success}} AS success,
           l.{{usage_log.metadata}}->>'task_id' AS task_id
    FROM {{usage_log}} l
    WHERE l.{{usage_log.user_id}} = :user_id
    ORDER BY l.{{usage_log.created_at}} DESC, l.{{usage_log.id}} LIMIT :limit
"""


def list_usage(connection: Connection, mapping: HostMapping, user_id: UserId, *, limit: int = 50) -> list[UsageRow]:
    """Return the user's newest log rows, newest first, whatever their window."""
    statement = text(render_sql(_LIST, mapping))
    rows = connection.execute(statement, {"user_id": user_id, "limit": limit})
    return [UsageRow(**row) for row in rows.mappings()]
