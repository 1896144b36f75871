"""Balances, and what keeps them true."""

from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Identity,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    event,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, OID

from trueup.database.schema.columns import moment, tokens


def add_balance_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "installation",
        metadata,
        # One row: this database serves one host mapping.
        Column("singleton", Boolean, primary_key=True, server_default=text("true")),
        Column("mapping_fingerprint", Text, nullable=False),
        Column("mapping", JSONB, nullable=False),
        moment("installed_at", server_default=func.now()),
        # The triggers, and the columns that they count, when the database was made ready: trueup.trigger_marks().
        Column("triggers", Text),
        # By which a log is noticed whose values were changed as a whole: trueup.has_old_values().
        Column("column_versions", Text),
        Column("log_files", ARRAY(OID)),
        # By which partitions that came with rows are noticed: trueup.partition_marks().
        Column("log_parents", ARRAY(OID)),
        Column("partitions", ARRAY(Text)),
        # Only trueup can compute the mark by which the log's triggers recognise trueup's own row.
        Column("mark_secret", Text, nullable=False, server_default=text("CAST(gen_random_uuid() AS text)")),
        CheckConstraint("singleton", name="installation_is_one_row"),
    )
    balance = Table(
        "balance",
        metadata,
        user_id(),
        moment("window_start"),
        tokens("log_epoch"),
        tokens("consumed", server_default=text("0")),
        tokens("held", server_default=text("0")),
        PrimaryKeyConstraint("user_id", name="balance_pkey"),
        # A hold given back twice would make tokens out of nothing.
        CheckConstraint("held >= 0", name="balance_held_not_negative"),
    )
    # Room on the page, so that the row's many updates stay there (HOT) and touch no index. SQLAlchemy 2.0 knows no
    # `postgresql_with` of a table.
    fill = DDL("ALTER TABLE %(fullname)s SET (fillfactor = 50)")  # type: ignore[no-untyped-call]
    event.listen(balance, "after_create", fill)
    Table(
        "usage_delta",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        moment("used_at"),
        tokens("tokens"),
        # A key and not only an index: a publication for all tables refuses deletes without one.
        PrimaryKeyConstraint("user_id", "id", name="usage_delta_pkey"),
    )
    Table(
        "log_truncation",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        moment("truncated_at", server_default=func.clock_timestamp()),
    )
