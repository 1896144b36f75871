"""User ids of the host's type, from an id or from the host's user object."""

import uuid
from contextlib import suppress
from typing import Any

from trueup.errors import InvalidInputError
from trueup.host.mapping import UserIdType
from trueup.settings.settings import get_settings

UserId = int | uuid.UUID | str

_MAX_BIGINT = 2**63 - 1


def user_id_of(user: Any) -> UserId | None:
    """Return the user's id: `user.pk`, `user.id` or `user` itself. None if the object has no id yet.

    Raises `InvalidInputError` for a value that can't be an id of the host's type.
    """
    attribute = next((name for name in ("pk", "id") if hasattr(user, name)), None)
    value = user if attribute is None else getattr(user, attribute)
    return None if value is None else parse_user_id(value, get_settings().host.user_id_type)


def parse_user_id(value: Any, user_id_type: UserIdType) -> UserId:
    """Return the user id for an external value. Raises `InvalidInputError` if it is not an id of that type."""
    if user_id_type == "bigint":
        return _parse_bigint(value)
    if user_id_type == "uuid":
        if isinstance(value, uuid.UUID):
            return value
        try:
            return uuid.UUID(str(value))
        except ValueError:
            raise InvalidInputError(f"user_id: {value!r} is no user id. Give a UUID.") from None
    # A lone surrogate is a Python character that PostgreSQL can't store.
    if not isinstance(value, str) or not value or any(c == "\x00" or "\ud800" <= c <= "\udfff" for c in value):
        raise InvalidInputError(f"user_id: {value!r} is no user id. Give a non-empty text.")
    return value


def _parse_bigint(value: Any) -> int:
    number = value
    # int() would also accept digits of other scripts, and "1_0" as 10, which is another user's id.
    if isinstance(value, str) and value.isascii() and "_" not in value:
        with suppress(ValueError):
            number = int(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise InvalidInputError(f"user_id: {value!r} is no user id. Give a whole number.")
    if abs(number) > _MAX_BIGINT:
        raise InvalidInputError(f"user_id: {number} is out of range. Ids are 64-bit whole numbers.")
    return number


def plain_id(user_id: UserId | None) -> int | str | None:
    """Return a user id as a JSON value."""
    return user_id if user_id is None or isinstance(user_id, int) else str(user_id)
