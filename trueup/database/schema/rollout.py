"""Tables of the modes of the gate, their changes, and the denials that a mode overrode."""

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Column, Identity, Index, MetaData, PrimaryKeyConstraint, Table, Text

from trueup.database.schema.columns import moment, tokens


def add_rollout_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "gate_mode",
        metadata,
        # '*' means every feature without a row of its own.
        Column("feature_name", Text, nullable=False),
        Column("mode", Text, nullable=False),
        PrimaryKeyConstraint("feature_name", name="gate_mode_pkey"),
        # An unknown mode would enforce nothing.
        CheckConstraint("mode IN ('enforce', 'observe', 'off')", name="gate_mode_is_known"),
    )
    Table(
        "gate_mode_change",
        metadata,
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("feature_name", Text, nullable=False),
        # Null: no row exists before or after the change, so the settings decide.
        Column("mode_before", Text, nullable=True),
        Column("mode", Text, nullable=True),
        Column("changed_by", Text, nullable=False),
        Column("note", Text, nullable=False),
        moment("changed_at"),
        PrimaryKeyConstraint("id", name="gate_mode_change_pkey"),
    )
    # Enforced denials, and denials that the feature's mode overrode.
    for name in ("denial", "observed_denial"):
        Table(
            name,
            metadata,
            user_id(),
            Column("id", BigInteger, Identity(always=True), nullable=False),
            Column("task_id", Text, nullable=False),
            Column("feature_name", Text, nullable=False),
            Column("reason", Text, nullable=False),
            tokens("tokens"),
            moment("denied_at"),
            PrimaryKeyConstraint("user_id", "id", name=f"{name}_pkey"),
            Index(f"{name}_by_time", "denied_at"),
        )
