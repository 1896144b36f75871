"""The table of who may open the live page: one-time login links, and sessions."""

from sqlalchemy import Boolean, CheckConstraint, Column, MetaData, PrimaryKeyConstraint, Table, Text

from trueup.database.schema.columns import moment


def add_access_table(metadata: MetaData) -> None:
    Table(
        "page_access",
        metadata,
        # SHA-256 of the secret: a reader of the table can't open the page with it.
        Column("fingerprint", Text, nullable=False),
        Column("kind", Text, nullable=False),
        # Whose decisions they are, for the audit.
        Column("operator", Text, nullable=False),
        # True: only for a browser on the machine of the API.
        Column("is_local", Boolean, nullable=False),
        moment("created_at"),
        moment("expires_at"),
        PrimaryKeyConstraint("fingerprint", name="page_access_pkey"),
        CheckConstraint("kind IN ('link', 'session')", name="page_access_kind_is_known"),
        # A link from a terminal must not open the page to another machine.
        CheckConstraint("kind = 'session' OR is_local", name="page_access_link_is_local"),
    )
