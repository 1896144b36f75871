"""Tables of the journal: every change of a counter, and the times since when no change goes unseen."""

from typing import Any

from sqlalchemy import BigInteger, Column, Identity, Integer, MetaData, PrimaryKeyConstraint, Table, Text, func
from sqlalchemy.types import UserDefinedType

from trueup.database.schema.columns import moment, tokens


class TransactionId(UserDefinedType[Any]):
    """The number of a transaction, which never repeats."""

    cache_ok = True

    def get_col_spec(self, **options: Any) -> str:
        return "xid8"


def add_journal_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "counter_entry",
        metadata,
        user_id(),
        # The lock of the subscription's row orders the entries of one subscription, and so their ids.
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("subscription_id", Text, nullable=False),
        # created, changed or deleted. A subscription that moves to another user is deleted for the one and created for
        # the other.
        Column("kind", Text, nullable=False),
        tokens("old_counter", nullable=True),
        tokens("new_counter", nullable=True),
        # The period and the plans of the row after the change; of a deleted row, before it.
        moment("window_start"),
        Column("token_plan_id", Text),
        Column("full_plan_id", Text),
        moment("at"),
        Column("transaction_id", TransactionId, nullable=False),
        Column("backend_pid", Integer, nullable=False),
        Column("application_name", Text, nullable=False),
        # host, or charge or correction: trueup wrote the counter, for this.
        Column("written_by", Text, nullable=False),
        # Without CHECK constraints: PostgreSQL prepares them anew for each insert, which made a host's update of a
        # counter a third slower. The trigger is the only writer, and its kinds are constants.
        # The only index: each one made a host's update of many counters slower by a tenth.
        PrimaryKeyConstraint("user_id", "at", "id", name="counter_entry_pkey"),
    )
    Table(
        "journal_start",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        moment("started_at", server_default=func.clock_timestamp()),
        # The trigger's number and the xmin of its catalog row. A trigger that was disabled for a while has another
        # xmin.
        Column("trigger_mark", Text, nullable=False),
    )
