"""Tables of reconcile runs and their shards, of drift and decisions about it, of defects and alerts."""

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
        # The scheduled time of the run; null: a person or a program requested it.
        moment("period", nullable=True),
        Column("requested_by", Text, nullable=False, server_default=text("''")),
        tokens("found_new", server_default=text("0")),
        tokens("in_review", server_default=text("0")),
        tokens("tokens_explained", server_default=text("0")),
        tokens("defects", server_default=text("0")),
        # When its alerts were raised. Null: they were not raised yet.
        moment("alerted_at", nullable=True),
        # The rules by which it may correct. Only a caller with the same rules continues the run.
        Column("rules", JSONB, nullable=False, server_default=text("'{}'")),
        # The process that plans or works on the run, and the end of its lease.
        Column("owner", Text),
        moment("lease_until", nullable=True),
        CheckConstraint(
            "status IN ('running', 'finished', 'failed', 'interrupted')",
            name="reconcile_run_status_is_known",
        ),
        CheckConstraint("kind IN ('quick', 'deep')", name="reconcile_run_kind_is_known"),
        # Several schedulers start one run for each period.
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
        # The number of attempts. It fences the owner of an earlier attempt.
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        # The number of failed attempts since the last progress.
        Column("failures", Integer, nullable=False, server_default=text("0")),
        # The number of subscriptions in the shard, counted at its first attempt; null until then.
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
        Column("certainty", Text, nullable=False, server_default=text("'possible'")),
        tokens("tokens_explained", server_default=text("0")),
        # The rule that decided on the action.
        Column("reason", Text, nullable=False, server_default=text("''")),
        # The newest run that found the same drift again, and the time.
        Column("last_run_id", BigInteger, nullable=False),
        moment("last_seen_at"),
        PrimaryKeyConstraint("user_id", "id", name="drift_pkey"),
        # A correction records the value that it wrote. Other actions write no value.
        CheckConstraint("(action = 'corrected') = (written IS NOT NULL)", name="drift_written_when_corrected"),
        CheckConstraint(
            "action IN ('corrected', 'reported', 'review', 'lost_race', 'waiting', 'tolerated', 'ignored')",
            name="drift_action_is_known",
        ),
        CheckConstraint("certainty IN ('proven', 'inferred', 'possible')", name="drift_certainty_is_known"),
        Index("drift_by_run", "run_id"),
        # The report of a run lists the drifts that it found first and the drifts that it found again.
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
        # The place of the component that it is about, from 1; null: the whole drift.
        Column("component", Integer),
        Column("decided_by", Text, nullable=False),
        Column("note", Text, nullable=False),
        tokens("counter_before", nullable=True),
        tokens("counter_after", nullable=True),
        Column("grant_id", BigInteger),
        moment("decided_at"),
        moment("window_start", nullable=True),
        PrimaryKeyConstraint("user_id", "id", name="drift_decision_pkey"),
        CheckConstraint("decision IN ('accept', 'grant', 'ignore', 'undo')", name="drift_decision_is_known"),
        # If two people make the same decision at once, it is recorded once.
        Index(
            "drift_decision_once",
            "user_id",
            "drift_id",
            "decision",
            text("coalesce(component, 0)"),
            unique=True,
        ),
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
        # A finding raises one alert on each channel.
        UniqueConstraint("key", "channel", name="alert_once"),
        CheckConstraint("status IN ('waiting', 'sent', 'failed')", name="alert_status_is_known"),
    )
