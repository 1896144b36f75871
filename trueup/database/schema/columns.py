"""Columns that several tables share."""

from typing import Any

from sqlalchemy import BigInteger, Column, DateTime, Text, Uuid
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
