"""The rows of the AI usage log, written by the host and by trueup."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from trueup.accounts.user_ids import UserId
from trueup.host.fields import SECTIONS
from trueup.host.mapping import HostMapping
from trueup.host.sql import render_statement
from trueup.usage.tracker import TrackedUsage, ai_usage, track_ai_usage

__all__ = ["SECTIONS", "TrackedUsage", "UsageRow", "ai_usage", "list_usage", "track_ai_usage"]


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """One row of the log. `total_tokens` counts against the budget only if `success` is true.

    `task_id` None: the host wrote the row.
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


# A host's row may have nulls in any nullable column, and dates outside Python's range, which are shown as the ends of
# that range. The charge row tells which rows belong to a task, because the host may write a task_id of its own.
_LIST = """
    SELECT CAST(l.{{ usage_log.id }} AS text) AS log_id,
           greatest(least(l.{{ usage_log.created_at }}, '9999-12-30'), '0001-01-03') AS created_at,
           coalesce({{ usage_log.section("l") }}, '') AS section,
           coalesce({{ usage_log.model_name("l") }}, '') AS model_name,
           coalesce({{ usage_log.prompt_tokens("l") }}, 0) AS prompt_tokens,
           coalesce({{ usage_log.completion_tokens("l") }}, 0) AS completion_tokens,
           coalesce(l.{{ usage_log.total_tokens }}, 0) AS total_tokens, {{ usage_log.success("l") }} IS TRUE AS success,
           (SELECT c.task_id FROM trueup.charge c
            WHERE c.user_id = l.{{ usage_log.user_id }}
              {% if usage_log.metadata %}AND c.task_id = {{ usage_log.metadata("l") }}->>'task_id'{% endif %}
              AND c.log_id = CAST(l.{{ usage_log.id }} AS text)) AS task_id
    FROM {{ usage_log }} l
    WHERE l.{{ usage_log.user_id }} = :user_id
    ORDER BY l.{{ usage_log.created_at }} DESC NULLS LAST, l.{{ usage_log.id }} LIMIT :limit
"""


def list_usage(connection: Connection, mapping: HostMapping, user_id: UserId, *, limit: int = 50) -> list[UsageRow]:
    """Return the user's log rows of all windows, newest first, at most `limit`."""
    rows = connection.execute(render_statement(_LIST, mapping), {"user_id": user_id, "limit": limit})
    return [UsageRow(**row) for row in rows.mappings()]
