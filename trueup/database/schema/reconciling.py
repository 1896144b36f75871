"""Reconcile runs and their shards, drift and what was decided about it, defects, alerts."""

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
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from trueup.database.schema.columns import moment, tokens


def add_reconcile_tables(metadata: MetaData, user_id: Any) -> None:
    _add_run_table(metadata)
    _add_work_tables(metadata, user_id)
    _add_drift_tables(metadata, user_id)
    _add_alert_table(metadata)


def _add_run_table(metadata: MetaData) -> None:
    Table(
        "reconcile_run",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("dry_run", Boolean, nullable=False),
        Column("only_user", Text),
        Column("status", Text, nullable=False),
        moment("started_at"),
        moment("finished_at", nullable=True),
        tokens("checked", server_default=text("0")),
        tokens("drifted", server_default=text("0")),
        tokens("corrected", server_default=text("0")),
        tokens("tokens_overstated", server_default=text("0")),
        tokens("tokens_understated", server_default=text("0")),
        Column("error", Text),
        Column("kind", Text, nullable=False, server_default=text("'quick'")),
        # The scheduled time that the run is for; null: somebody asked for it.
        moment("period", nullable=True),
        Column("requested_by", Text, nullable=False, server_default=text("''")),
        tokens("found_new", server_default=text("0")),
        tokens("in_review", server_default=text("0")),
        tokens("tokens_explained", server_default=text("0")),
        tokens("defects", server_default=text("0")),
        # When its alerts were raised; null: not yet.
        moment("alerted_at", nullable=True),
        # What it may do by itself: only who is to do the same goes on with it.
        Column("rules", JSONB, nullable=False, server_default=text("'{}'")),
        # Who plans it or works on it, and until when another may not take it over.
        Column("owner", Text),
        moment("lease_until", nullable=True),
        CheckConstraint(
            "status IN ('running', 'finished', 'failed', 'interrupted')",
            name="reconcile_run_status_is_known",
        ),
        CheckConstraint("kind IN ('quick', 'deep')", name="reconcile_run_kind_is_known"),
        # Ten schedulers that are due at the same time make one run.
        UniqueConstraint("kind", "period", name="reconcile_run_once_per_period"),
        # Runs never overlap.
        Index("reconcile_run_one_at_work", "status", unique=True, postgresql_where=text("status = 'running'")),
    )


def _add_work_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "reconcile_shard",
        metadata,
        Column("run_id", BigInteger, nullable=False),
        Column("number", Integer, nullable=False),
        user_id("first_user", nullable=True),
        user_id("last_user", nullable=True),
        user_id("cursor_user", nullable=True),
        Column("status", Text, nullable=False),
        Column("owner", Text),
        moment("lease_until", nullable=True),
        # How often it was begun: the number fences an owner that was overtaken.
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        # How often that ended badly since it last got on.
        Column("failures", Integer, nullable=False, server_default=text("0")),
        # The subscriptions in it, counted when it was begun first; null until then.
        tokens("total", nullable=True),
        tokens("checked", server_default=text("0")),
        moment("updated_at"),
        Column("error", Text),
        PrimaryKeyConstraint("run_id", "number", name="reconcile_shard_pkey"),
        CheckConstraint(
            "status IN ('waiting', 'running', 'finished', 'failed')", name="reconcile_shard_status_is_known"
        ),
    )
    Table(
        "defect",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("run_id", BigInteger, nullable=False),
        user_id(nullable=True),
        Column("kind", Text, nullable=False),
        tokens("seen", nullable=True),
        tokens("expected", nullable=True),
        Column("repaired", Boolean, nullable=False),
        Column("detail", JSONB, nullable=False, server_default=text("'{}'")),
        moment("found_at"),
        Index("defect_by_run", "run_id"),
    )


def _add_drift_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "drift",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("run_id", BigInteger, nullable=False),
        Column("subscription_id", Text, nullable=False),
        tokens("observed", nullable=True),
        tokens("expected"),
        tokens("written", nullable=True),
        Column("cause", Text, nullable=False),
        Column("action", Text, nullable=False),
        Column("evidence", JSONB, nullable=False),
        moment("found_at"),
        Column("certainty", Text, nullable=False, server_default=text("'likely'")),
        tokens("tokens_explained", server_default=text("0")),
        # Why this action: the rule that decided.
        Column("reason", Text, nullable=False, server_default=text("''")),
        # The newest run that saw the same drift again, and when.
        Column("last_run_id", BigInteger, nullable=False),
        moment("last_seen_at"),
        PrimaryKeyConstraint("user_id", "id", name="drift_pkey"),
        # A correction says what it wrote; what was not corrected wrote nothing.
        CheckConstraint("(action = 'corrected') = (written IS NOT NULL)", name="drift_written_when_corrected"),
        CheckConstraint(
            "action IN ('corrected', 'reported', 'review', 'lost_race', 'waiting', 'tolerated', 'ignored')",
            name="drift_action_is_known",
        ),
        CheckConstraint("certainty IN ('certain', 'likely', 'possible')", name="drift_certainty_is_known"),
        Index("drift_by_run", "run_id"),
        # A run's report: what it found, and what it saw again.
        Index("drift_by_last_run", "last_run_id"),
        Index("drift_in_review", "id", postgresql_where=text("action = 'review'")),
    )
    Table(
        "drift_decision",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("drift_id", BigInteger, nullable=False),
        Column("decision", Text, nullable=False),
        Column("decided_by", Text, nullable=False),
        Column("note", Text, nullable=False),
        tokens("counter_before", nullable=True),
        tokens("counter_after", nullable=True),
        Column("grant_id", BigInteger),
        moment("decided_at"),
        moment("window_start", nullable=True),
        PrimaryKeyConstraint("user_id", "id", name="drift_decision_pkey"),
        CheckConstraint("decision IN ('accept', 'grant', 'ignore', 'undo')", name="drift_decision_is_known"),
        # Two people who decide the same at once decide it once.
        UniqueConstraint("user_id", "drift_id", "decision", name="drift_decision_once"),
    )


def _add_alert_table(metadata: MetaData) -> None:
    Table(
        "alert",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("key", Text, nullable=False),
        Column("kind", Text, nullable=False),
        Column("channel", Text, nullable=False),
        Column("payload", JSONB, nullable=False),
        Column("status", Text, nullable=False),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        moment("next_attempt_at"),
        moment("created_at"),
        moment("sent_at", nullable=True),
        Column("error", Text),
        # The same finding alerts once on each channel.
        UniqueConstraint("key", "channel", name="alert_once"),
        CheckConstraint("status IN ('waiting', 'sent', 'failed')", name="alert_status_is_known"),
    )
