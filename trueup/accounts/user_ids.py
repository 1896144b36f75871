"""Who is meant: a user id of the host's own type, from an id or from the host's user object."""

import uuid
from typing import Any

from trueup.errors import InvalidInputError
from trueup.host.mapping import UserIdType
from trueup.settings.settings import get_settings

UserId = int | uuid.UUID | str

_MAX_BIGINT = 2**63 - 1


def user_id_of(user: Any) -> UserId | None:
    """Return the user's id: `user` itself, or its `.pk` or `.id`. None for an object that has none yet.

    Raises `InvalidInputError` for what can't be an id of the host's type.
    """
    for attribute in ("pk", "id"):
        if hasattr(user, attribute):
            user = getattr(user, attribute)
            break
    if user is None:
        return None
    return parse_user_id(user, get_settings().host.user_id_type)


def parse_user_id(value: Any, user_id_type: UserIdType) -> UserId:
    """Turn a value from outside into a user id. Raises `InvalidInputError`, naming the field."""
    if user_id_type == "bigint":
        return _parse_bigint(value)
    if user_id_type == "uuid":
        if isinstance(value, uuid.UUID):
            return value
        try:
            return uuid.UUID(str(value))
        except ValueError:
            raise InvalidInputError(f"user_id: {value!r} is no UUID") from None
    if not isinstance(value, str) or not value or "\x00" in value or not _is_text(value):
        raise InvalidInputError(f"user_id: {value!r} is no user id: give a non-empty text")
    return value


def _is_text(value: str) -> bool:
    """Half of a surrogate pair is a Python character and no text."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _parse_bigint(value: Any) -> int:
    # int() would also take other scripts' digits, and "1_0" for 10: somebody else's id.
    if isinstance(value, str) and value.isascii() and "_" not in value:
        try:
            value = int(value)
        except ValueError:
            raise InvalidInputError(f"user_id: {value!r} is no user id: give a whole number") from None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(f"user_id: {value!r} is no user id: give a whole number")
    if abs(value) > _MAX_BIGINT:
        raise InvalidInputError(f"user_id: {value} is out of range: ids are 64-bit whole numbers")
    return value


def plain_id(user_id: UserId | None) -> int | str | None:
    """Return a user's id as JSON takes it."""
    return user_id if user_id is None or isinstance(user_id, int) else str(user_id)
