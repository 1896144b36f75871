"""Tasks that were asked for over HTTP."""

from typing import Any

from sqlalchemy import Column, Index, MetaData, PrimaryKeyConstraint, Table, Text, UniqueConstraint

from trueup.database.schema.columns import moment


def add_request_table(metadata: MetaData, user_id: Any) -> None:
    Table(
        "task_request",
        metadata,
        user_id(),
        Column("idempotency_key", Text, nullable=False),
        # Of the task and its arguments: the same key with others is a mistake.
        Column("fingerprint", Text, nullable=False),
        Column("task_id", Text, nullable=False),
        Column("task", Text, nullable=False),
        moment("created_at"),
        # Null: the task may not have been sent yet, and the next request of the same key sends it.
        moment("sent_at", nullable=True),
        # Two requests of one key, at once or one after the other, are one task.
        PrimaryKeyConstraint("user_id", "idempotency_key", name="task_request_pkey"),
        # Whose a task is stands here alone.
        UniqueConstraint("user_id", "task_id", name="task_request_by_task"),
        Index("task_request_by_age", "created_at"),
    )
