"""Tables of the balances, the deltas, and the baseline with which holds and checks compare."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Identity,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, OID

from trueup.database.schema.columns import leave_space, moment, tokens


def add_balance_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "installation",
        metadata,
        # One row, because a database serves one host mapping.
        Column("singleton", Boolean, primary_key=True, server_default=text("true")),
        Column("mapping_fingerprint", Text, nullable=False),
        Column("mapping", JSONB, nullable=False),
        moment("installed_at", server_default=func.now()),
        # The baseline of the triggers and of the columns that they count: trueup.trigger_marks().
        Column("triggers", Text),
        # The baseline that detects a rewrite of all values of the log: trueup.has_old_values().
        Column("column_versions", Text),
        Column("log_files", ARRAY(OID)),
        # The baseline that detects partitions that were attached with rows: trueup.partition_marks().
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
        # Releasing a hold twice would create tokens.
        CheckConstraint("held >= 0", name="balance_held_not_negative"),
    )
    leave_space(balance)
    Table(
        "usage_delta",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        moment("used_at"),
        tokens("tokens"),
        # A primary key, not only an index: a publication for all tables refuses deletes without a key.
        PrimaryKeyConstraint("user_id", "id", name="usage_delta_pkey"),
    )
    Table(
        "log_truncation",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        moment("truncated_at", server_default=func.clock_timestamp()),
    )
