"""Tables of holds, charges and their events, call intents, and the outbox of side effects."""

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

from trueup.database.schema.columns import leave_space, moment, tokens

# Violated where another request, of another user, has the task id.
ONE_OPEN_PER_TASK = "hold_one_open_per_task"


# The classes of tokens that a charge keeps apart.
CHARGE_CLASSES = ("input", "cached_input", "cache_write", "output", "reasoning", "audio")


def add_hold_tables(metadata: MetaData, user_id: Any) -> None:
    _add_hold_table(metadata, user_id)
    _add_call_tables(metadata, user_id)


def _add_hold_table(metadata: MetaData, user_id: Any) -> None:
    hold = Table(
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
        # If set, the task's body has ended, and the hold is open only for calls in flight of earlier attempts.
        moment("body_ended_at", nullable=True),
        # The number of the waiting duplicate. Copies of its message carry older numbers.
        Column("duplicate_waits", Integer, nullable=False, server_default=text("0")),
        PrimaryKeyConstraint("user_id", "task_id", "id", name="hold_pkey"),
        CheckConstraint("status IN ('open', 'settled', 'released', 'expired')", name="hold_status_is_known"),
        # A hold ends exactly once and is never reopened.
        CheckConstraint("(status = 'open') = (closed_at IS NULL)", name="hold_closed_when_not_open"),
        # Charges can't take more tokens from a hold than were reserved.
        CheckConstraint("tokens_covered BETWEEN 0 AND tokens_reserved", name="hold_covers_what_it_has"),
        # Two deliveries of one task can't both reserve tokens. Neither can the requests of two users with one task id,
        # because they would share one result. Keys of ai_tokens blocks belong to each user.
        Index(
            ONE_OPEN_PER_TASK,
            "task_id",
            text("(CASE WHEN request = '' THEN user_id::text ELSE '' END)"),
            unique=True,
            postgresql_where=text("status = 'open'"),
        ),
        # By user, whose overdue holds the gate ends. Not by expiry: each call and heartbeat changes it, and an update
        # that changes no index stays on its page.
        Index("hold_open", "user_id", postgresql_where=text("status = 'open'")),
    )
    leave_space(hold)


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
        # False: the host had locked the counter, so the counter lacks this charge. Null: not known.
        Column("counter_lowered", Boolean),
        # The billed tokens by class, before the settings' weights. Null: not known.
        *(tokens(f"tokens_{name}", nullable=True) for name in CHARGE_CLASSES),
        # A provider call is charged once, however often its task is redelivered.
        PrimaryKeyConstraint("user_id", "task_id", "call_key", name="charge_pkey"),
        CheckConstraint("tokens_covered BETWEEN 0 AND tokens_total", name="charge_covered_within_total"),
        Index("charge_by_time", "charged_at", postgresql_using="brin"),
    )
    _add_owed_table(metadata, user_id)
    _add_event_table(metadata, user_id)
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
        # Each attempt's call is separate evidence, even if two attempts make the same call.
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
        # The number of attempts to send. A late result of an earlier attempt does not count for a later one.
        Column("tries", Integer, nullable=False, server_default=text("1")),
        # A task's side effect has one row, however often the task is redelivered.
        PrimaryKeyConstraint("user_id", "task_id", "effect", name="outbox_pkey"),
        CheckConstraint("status IN ('sending', 'sent', 'unknown', 'failed')", name="outbox_status_is_known"),
    )


def _add_owed_table(metadata: MetaData, user_id: Any) -> None:
    """A charge whose row the host's usage log refused. It has the values of that row, and counts as usage."""
    Table(
        "owed_charge",
        metadata,
        user_id(),
        Column("task_id", Text, nullable=False),
        Column("call_key", Text, nullable=False),
        Column("log_id", Text, nullable=False),
        Column("section", Text, nullable=False),
        Column("model_name", Text, nullable=False),
        tokens("prompt_tokens"),
        tokens("completion_tokens"),
        tokens("total_tokens"),
        tokens("response_time_ms"),
        Column("success", Boolean, nullable=False),
        Column("error", Text),
        Column("metadata", JSONB, nullable=False),
        moment("used_at"),
        # Why the log refused the row at the last try: PostgreSQL's code and its message.
        Column("sqlstate", Text, nullable=False),
        Column("refusal", Text, nullable=False),
        Column("tries", Integer, nullable=False),
        moment("owed_since"),
        moment("tried_at"),
        # A charge is owed once, so that it can be settled only once.
        PrimaryKeyConstraint("user_id", "task_id", "call_key", name="owed_charge_pkey"),
    )


def _add_event_table(metadata: MetaData, user_id: Any) -> None:
    """A charge of which the host's own function has not been told yet (`TRUEUP_ON_CHARGE`)."""
    Table(
        "charge_event",
        metadata,
        user_id(),
        Column("key", Text, nullable=False),
        # Null: usage that the host reported. It has no task and no feature.
        Column("task_id", Text),
        Column("feature_name", Text),
        Column("section", Text, nullable=False),
        Column("model_name", Text, nullable=False),
        tokens("prompt_tokens"),
        tokens("completion_tokens"),
        tokens("total_tokens"),
        Column("classes", JSONB),
        moment("charged_at"),
        # The next try. A process that delivers the event has set it to a later time.
        moment("due_at"),
        Column("tries", Integer, nullable=False, server_default=text("0")),
        Column("last_error", Text),
        # A charge is one event.
        PrimaryKeyConstraint("user_id", "key", name="charge_event_pkey"),
        Index("charge_event_due", "due_at"),
    )
