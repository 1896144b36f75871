"""The table of tasks that were requested over HTTP."""

from typing import Any

from sqlalchemy import Column, Index, MetaData, PrimaryKeyConstraint, Table, Text, UniqueConstraint

from trueup.database.schema.columns import moment


def add_request_table(metadata: MetaData, user_id: Any) -> None:
    Table(
        "task_request",
        metadata,
        user_id(),
        Column("idempotency_key", Text, nullable=False),
        # Of the task and its arguments. The same key with other arguments is refused.
        Column("fingerprint", Text, nullable=False),
        Column("task_id", Text, nullable=False),
        Column("task", Text, nullable=False),
        moment("created_at"),
        # Null: the task may not have been sent. The next request with the same key sends it.
        moment("sent_at", nullable=True),
        # Requests with the same key, concurrent or not, are one task.
        PrimaryKeyConstraint("user_id", "idempotency_key", name="task_request_pkey"),
        # Only this table records the user of a task.
        UniqueConstraint("user_id", "task_id", name="task_request_by_task"),
        Index("task_request_by_age", "created_at"),
    )
