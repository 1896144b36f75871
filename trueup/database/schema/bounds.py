"""The table of learned bounds."""

from sqlalchemy import BigInteger, CheckConstraint, Column, MetaData, PrimaryKeyConstraint, Table, Text


def add_bound_tables(metadata: MetaData) -> None:
    Table(
        "prompt_ratio",
        metadata,
        Column("model_name", Text, nullable=False),
        # The script of a text, and whether it has many signs or long words.
        Column("text_class", Text, nullable=False),
        Column("samples", BigInteger, nullable=False),
        # Tokens per million bytes of UTF-8, the most that a provider reported.
        Column("highest", BigInteger, nullable=False),
        # All workers learn into one row.
        PrimaryKeyConstraint("model_name", "text_class", name="prompt_ratio_pkey"),
        # A byte makes at most one token, so a larger figure is an error that would make all bounds useless.
        CheckConstraint("highest BETWEEN 0 AND 1000000", name="prompt_ratio_within_bytes"),
    )
