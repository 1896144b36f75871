"""Tables of grants, of their use in each window, and of the windows."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Identity,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)

from trueup.database.schema.columns import moment, tokens


def add_grant_tables(metadata: MetaData, user_id: Any) -> None:
    Table(
        "token_grant",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        tokens("tokens"),
        Column("reason", Text, nullable=False),
        Column("reference", Text),
        moment("granted_at", server_default=func.now()),
        moment("expires_at", nullable=True),
        moment("revoked_at", nullable=True),
        Column("granted_by", Text, nullable=False, server_default=text("''")),
        Column("revoked_by", Text),
        Column("revoke_reason", Text),
        PrimaryKeyConstraint("user_id", "id", name="token_grant_pkey"),
        # The same payment can't grant twice.
        UniqueConstraint("user_id", "reference", name="token_grant_once_per_reference"),
        CheckConstraint("tokens > 0", name="token_grant_adds_tokens"),
        CheckConstraint("(revoked_at IS NULL) = (revoked_by IS NULL)", name="token_grant_revoked_by_someone"),
    )
    Table(
        "grant_use",
        metadata,
        user_id(),
        Column("grant_id", BigInteger, nullable=False),
        moment("window_start"),
        tokens("tokens"),
        # A window's use of a grant is recorded once, even if several transactions settle it.
        PrimaryKeyConstraint("user_id", "grant_id", "window_start", name="grant_use_pkey"),
        CheckConstraint("tokens >= 0", name="grant_use_not_negative"),
    )
    Table(
        "window_change",
        metadata,
        user_id(),
        Column("id", BigInteger, Identity(always=True), nullable=False),
        moment("window_start"),
        # The plan ids of the host's row. The plan's size is looked up later; after that, the ids are not used.
        Column("token_plan_id", Text),
        Column("full_plan_id", Text),
        tokens("plan_tokens", nullable=True),
        moment("changed_at"),
        # When the next window began; set when this window's use of grants has been recorded.
        moment("settled_until", nullable=True),
        PrimaryKeyConstraint("user_id", "id", name="window_change_pkey"),
    )
