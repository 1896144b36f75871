"""Columns that several tables share, and the space that their rows need."""

from typing import Any

from sqlalchemy import BigInteger, Column, DateTime, Table, Text, Uuid
from sqlalchemy.types import TypeEngine

from trueup.host.mapping import UserIdType


def user_id_column_type(user_id_type: UserIdType) -> TypeEngine[Any]:
    """Return the column type for the host's own type of user id."""
    types: dict[UserIdType, TypeEngine[Any]] = {
        "bigint": BigInteger(),
        "uuid": Uuid(),
        "text": Text(),
    }
    return types[user_id_type]


def moment(name: str, *, nullable: bool = False, **options: Any) -> Column[Any]:
    """Return a column for a time."""
    return Column(name, DateTime(timezone=True), nullable=nullable, **options)


def tokens(name: str, *, nullable: bool = False, **options: Any) -> Column[Any]:
    """Return a column for a count of tokens."""
    return Column(name, BigInteger, nullable=nullable, **options)


# Options that SQLAlchemy 2.0 can't give to a table (`postgresql_with`), as a clause of ALTER TABLE.
OPTIONS = "trueup_options"


def leave_space(table: Table) -> None:
    """Leave half of each page free, so that updates of a row stay on its page (HOT) and write no index."""
    table.info[OPTIONS] = "SET (fillfactor = 50)"
