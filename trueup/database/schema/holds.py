"""Holds, charges, calls in flight, the outbox of side effects."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from trueup.database.schema.columns import moment, tokens

# Violated where another request, of another user, has the task id.
ONE_OPEN_PER_TASK = "hold_one_open_per_task"


def add_hold_tables(metadata: MetaData, user_id: Any) -> None:
    _add_hold_table(metadata, user_id)
    _add_call_tables(metadata, user_id)


def _add_hold_table(metadata: MetaData, user_id: Any) -> None:
    Table(
        "hold",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("task_id", Text, nullable=False),
        # The fingerprint of what the task was asked to do. Empty: a block of ai_tokens, whose key says it.
        Column("request", Text, nullable=False, server_default=text("''")),
        # The retries by which the body asked for new answers. The calls of each have keys of their own.
        Column("fresh_retries", Integer, nullable=False, server_default=text("0")),
        Column("attempt", Integer, nullable=False),
        Column("feature_name", Text, nullable=False),
        Column("section", Text, nullable=False),
        Column("owner", Text, nullable=False),
        Column("status", Text, nullable=False),
        tokens("tokens_reserved"),
        tokens("tokens_covered", server_default=text("0")),
        tokens("tokens_charged", server_default=text("0")),
        Column("calls", Integer, nullable=False, server_default=text("0")),
        moment("opened_at"),
        moment("expires_at"),
        moment("closed_at", nullable=True),
        Column("retries", Integer, nullable=False, server_default=text("0")),
        moment("lease_until", server_default=text("'-infinity'")),
        Column("completed", Boolean, nullable=False, server_default=text("false")),
        moment("duplicate_until", nullable=True),
        # Set: its body has ended, and it is open only for calls of earlier attempts that are in flight.
        moment("body_ended_at", nullable=True),
        # The number of the duplicate that waits: copies of its message carry older ones.
        Column("duplicate_waits", Integer, nullable=False, server_default=text("0")),
        PrimaryKeyConstraint("user_id", "task_id", "id", name="hold_pkey"),
        CheckConstraint("status IN ('open', 'settled', 'released', 'expired')", name="hold_status_is_known"),
        # A hold ends exactly once, and then stays ended.
        CheckConstraint("(status = 'open') = (closed_at IS NULL)", name="hold_closed_when_not_open"),
        # Charges can't take more out of a hold than was put aside.
        CheckConstraint("tokens_covered BETWEEN 0 AND tokens_reserved", name="hold_covers_what_it_has"),
        # Two deliveries of one task can't both set tokens aside. Nor can requests of two users under one task id, which
        # would share one result; only the keys of ai_tokens blocks are each user's own.
        Index(
            ONE_OPEN_PER_TASK,
            "task_id",
            text("(CASE WHEN request = '' THEN user_id::text ELSE '' END)"),
            unique=True,
            postgresql_where=text("status = 'open'"),
        ),
        Index("hold_overdue", "expires_at", postgresql_where=text("status = 'open'")),
    )


def _add_call_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "charge",
        metadata,
        user_id(),
        Column("task_id", Text, nullable=False),
        Column("call_key", Text, nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("log_id", Text, nullable=False),
        Column("section", Text, nullable=False),
        Column("model_name", Text, nullable=False),
        tokens("tokens_total"),
        tokens("tokens_covered"),
        Column("late", Boolean, nullable=False),
        Column("answer", JSONB),
        moment("charged_at"),
        Column("hold_id", BigInteger),
        # False: the host had the counter locked, so this charge is missing in it. Null: not known.
        Column("counter_lowered", Boolean),
        # A provider call is paid for once, whatever is delivered again.
        PrimaryKeyConstraint("user_id", "task_id", "call_key", name="charge_pkey"),
        CheckConstraint("tokens_covered BETWEEN 0 AND tokens_total", name="charge_covered_within_total"),
        Index("charge_by_time", "charged_at", postgresql_using="brin"),
    )
    Table(
        "call_intent",
        metadata,
        user_id(),
        Column("task_id", Text, nullable=False),
        Column("call_key", Text, nullable=False),
        Column("attempt", Integer, nullable=False),
        tokens("tokens_bound"),
        Column("outcome", Text, nullable=False),
        moment("started_at"),
        # Each attempt's call is evidence of its own, also when two attempts make the same one.
        PrimaryKeyConstraint("user_id", "task_id", "call_key", "attempt", name="call_intent_pkey"),
        CheckConstraint("outcome IN ('started', 'unknown')", name="call_intent_outcome_is_known"),
    )
    Table(
        "outbox",
        metadata,
        user_id(),
        Column("task_id", Text, nullable=False),
        Column("effect", Text, nullable=False),
        Column("status", Text, nullable=False),
        Column("detail", JSONB, nullable=False, server_default=text("'{}'")),
        moment("created_at"),
        moment("updated_at"),
        # How often it was begun to be sent: a late word about an earlier try does not count for a later one.
        Column("tries", Integer, nullable=False, server_default=text("1")),
        # A task's side effect is one row, whatever is delivered again.
        PrimaryKeyConstraint("user_id", "task_id", "effect", name="outbox_pkey"),
        CheckConstraint("status IN ('sending', 'sent', 'unknown', 'failed')", name="outbox_status_is_known"),
    )
