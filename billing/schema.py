"""trueup's own tables, all in PostgreSQL schema `trueup`, keyed by the user first. Tokens are bigint counts.

The migrations create them; a test proves both equal. What the constraints prevent stands in their comments.
"""

from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

from billing.mapping import UserIdType

SCHEMA = "trueup"


def user_id_column_type(user_id_type: UserIdType) -> TypeEngine[Any]:
    """Return the column type for the host's own type of user id."""
    types: dict[UserIdType, TypeEngine[Any]] = {
        "bigint": BigInteger(),
        "uuid": Uuid(),
        "text": Text(),
    }
    return types[user_id_type]


def _moment(name: str, *, nullable: bool = False, **options: Any) -> Column[Any]:
    return Column(name, DateTime(timezone=True), nullable=nullable, **options)


def _tokens(name: str, *, nullable: bool = False, **options: Any) -> Column[Any]:
    return Column(name, BigInteger, nullable=nullable, **options)


def build_metadata(user_id_type: UserIdType) -> MetaData:
    """Return the tables for a host whose user ids are of that type."""
    metadata = MetaData(schema=SCHEMA)

    def user_id() -> Column[Any]:
        return Column("user_id", user_id_column_type(user_id_type), nullable=False, autoincrement=False)

    _add_balance_tables(metadata, user_id)
    _add_hold_tables(metadata, user_id)
    _add_reconcile_tables(metadata, user_id)
    return metadata


@cache
def own_table(name: str, user_id_type: UserIdType) -> Table:
    """Return one of trueup's own tables, for use in Core statements."""
    return build_metadata(user_id_type).tables[f"{SCHEMA}.{name}"]


def _add_balance_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "installation",
        metadata,
        # One row: this database serves one host mapping.
        Column("singleton", Boolean, primary_key=True, server_default=text("true")),
        Column("mapping_fingerprint", Text, nullable=False),
        Column("mapping", JSONB, nullable=False),
        _moment("installed_at", server_default=func.now()),
        CheckConstraint("singleton", name="installation_is_one_row"),
    )
    Table(
        "balance",
        metadata,
        user_id(),
        _moment("window_start"),
        _tokens("log_epoch"),
        _tokens("consumed", server_default=text("0")),
        _tokens("held", server_default=text("0")),
        PrimaryKeyConstraint("user_id", name="balance_pkey"),
        # A hold given back twice would make tokens out of nothing.
        CheckConstraint("held >= 0", name="balance_held_not_negative"),
        # Room on the page, so that the row's many updates stay there (HOT) and touch no index.
        postgresql_with={"fillfactor": 50},
    )
    Table(
        "usage_delta",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        _moment("used_at"),
        _tokens("tokens"),
        # A key and not only an index: a publication for all tables refuses deletes without one.
        PrimaryKeyConstraint("user_id", "id", name="usage_delta_pkey"),
    )
    Table(
        "log_truncation",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        _moment("truncated_at", server_default=func.clock_timestamp()),
    )
    Table(
        "token_grant",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        _tokens("tokens"),
        Column("reason", Text, nullable=False),
        Column("reference", Text),
        _moment("granted_at", server_default=func.now()),
        _moment("expires_at", nullable=True),
        _moment("revoked_at", nullable=True),
        PrimaryKeyConstraint("user_id", "id", name="token_grant_pkey"),
        # The same payment can't grant twice.
        UniqueConstraint("user_id", "reference", name="token_grant_once_per_reference"),
        CheckConstraint("tokens > 0", name="token_grant_adds_tokens"),
    )


# As long as its tables: split, it would be no easier to compare with the migrations.
def _add_hold_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "hold",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("task_id", Text, nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("feature_name", Text, nullable=False),
        Column("section", Text, nullable=False),
        Column("owner", Text, nullable=False),
        Column("status", Text, nullable=False),
        _tokens("tokens_reserved"),
        _tokens("tokens_covered", server_default=text("0")),
        _tokens("tokens_charged", server_default=text("0")),
        Column("calls", Integer, nullable=False, server_default=text("0")),
        _moment("opened_at"),
        _moment("expires_at"),
        _moment("closed_at", nullable=True),
        Column("retries", Integer, nullable=False, server_default=text("0")),
        _moment("lease_until", server_default=text("'-infinity'")),
        Column("completed", Boolean, nullable=False, server_default=text("false")),
        _moment("duplicate_until", nullable=True),
        PrimaryKeyConstraint("user_id", "task_id", "id", name="hold_pkey"),
        CheckConstraint("status IN ('open', 'settled', 'released', 'expired')", name="hold_status_is_known"),
        # A hold ends exactly once, and then stays ended.
        CheckConstraint("(status = 'open') = (closed_at IS NULL)", name="hold_closed_when_not_open"),
        # Charges can't take more out of a hold than was put aside.
        CheckConstraint("tokens_covered BETWEEN 0 AND tokens_reserved", name="hold_covers_what_it_has"),
        # Two deliveries of one task can't both set tokens aside.
        Index(
            "hold_one_open_per_task",
            "user_id",
            "task_id",
            unique=True,
            postgresql_where=text("status = 'open'"),
        ),
        Index("hold_overdue", "expires_at", postgresql_where=text("status = 'open'")),
    )
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
        _tokens("tokens_total"),
        _tokens("tokens_covered"),
        Column("late", Boolean, nullable=False),
        Column("answer", JSONB),
        _moment("charged_at"),
        Column("hold_id", BigInteger),
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
        _tokens("tokens_bound"),
        Column("outcome", Text, nullable=False),
        _moment("started_at"),
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
        _moment("created_at"),
        _moment("updated_at"),
        # A task's side effect is one row, whatever is delivered again.
        PrimaryKeyConstraint("user_id", "task_id", "effect", name="outbox_pkey"),
        CheckConstraint("status IN ('sending', 'sent', 'unknown', 'failed')", name="outbox_status_is_known"),
    )


def _add_reconcile_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "reconcile_run",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("dry_run", Boolean, nullable=False),
        Column("only_user", Text),
        Column("status", Text, nullable=False),
        _moment("started_at"),
        _moment("finished_at", nullable=True),
        _tokens("checked", server_default=text("0")),
        _tokens("drifted", server_default=text("0")),
        _tokens("corrected", server_default=text("0")),
        _tokens("tokens_overstated", server_default=text("0")),
        _tokens("tokens_understated", server_default=text("0")),
        Column("error", Text),
        CheckConstraint(
            "status IN ('running', 'finished', 'failed', 'interrupted')",
            name="reconcile_run_status_is_known",
        ),
    )
    Table(
        "drift",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("run_id", BigInteger, nullable=False),
        Column("subscription_id", Text, nullable=False),
        _tokens("observed", nullable=True),
        _tokens("expected"),
        _tokens("written", nullable=True),
        Column("cause", Text, nullable=False),
        Column("action", Text, nullable=False),
        Column("evidence", JSONB, nullable=False),
        _moment("found_at"),
        PrimaryKeyConstraint("user_id", "id", name="drift_pkey"),
        # A correction says what it wrote; what was not corrected wrote nothing.
        CheckConstraint("(action = 'corrected') = (written IS NOT NULL)", name="drift_written_when_corrected"),
        CheckConstraint(
            "action IN ('corrected', 'reported', 'review', 'lost_race')",
            name="drift_action_is_known",
        ),
        Index("drift_by_run", "run_id"),
    )
