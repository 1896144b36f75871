import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from trueup.accounts.user_ids import parse_user_id, user_id_of
from trueup.errors import InvalidInputError
from trueup.host.mapping import UserIdType
from trueup.settings.settings import get_settings

ID = uuid.UUID("0d5dbbcb-54bd-4a40-91b8-d4e9a0a2a6e0")


@pytest.mark.parametrize(
    ("kind", "value", "user_id"),
    [
        ("bigint", 5, 5),
        ("bigint", -5, -5),
        ("bigint", "5", 5),
        ("bigint", " 5 ", 5),
        ("bigint", "-5", -5),
        ("bigint", 2**63 - 1, 2**63 - 1),
        ("uuid", ID, ID),
        ("uuid", str(ID), ID),
        ("uuid", str(ID).upper(), ID),
        ("text", "a b", "a b"),
        ("text", "5", "5"),
    ],
)
def test_an_id_of_the_hosts_type_is_accepted(kind: UserIdType, value: Any, user_id: Any) -> None:
    assert parse_user_id(value, kind) == user_id


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("bigint", True),
        ("bigint", 5.0),
        ("bigint", "five"),
        ("bigint", ""),
        ("bigint", "-"),
        ("bigint", "--5"),
        ("bigint", "1_0"),
        ("bigint", "٥"),
        ("bigint", b"5"),
        ("bigint", 2**63),
        ("bigint", "9" * 5_000),
        ("bigint", [5]),
        ("uuid", "x"),
        ("uuid", 5),
        ("text", ""),
        ("text", 5),
        ("text", "a\x00b"),
        ("text", "\ud83d"),
    ],
)
def test_any_other_value_is_refused_by_name(kind: UserIdType, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^user_id: "):
        parse_user_id(value, kind)


@pytest.fixture(autouse=True)
def _default_settings() -> Any:
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.mark.parametrize(
    ("user", "user_id"),
    [
        (7, 7),
        ("7", 7),
        (SimpleNamespace(pk=7, id=8), 7),
        (SimpleNamespace(id=7), 7),
        (SimpleNamespace(pk="7"), 7),
        (None, None),
        (SimpleNamespace(pk=None, id=None), None),
        (SimpleNamespace(id=None), None),
    ],
)
def test_a_user_is_an_id_or_an_object_with_one(user: Any, user_id: int | None) -> None:
    assert user_id_of(user) == user_id


@pytest.mark.parametrize(
    "user", [object(), SimpleNamespace(name="x"), {"id": 5}, SimpleNamespace(pk=SimpleNamespace())]
)
def test_an_object_that_is_no_id_and_has_none_is_refused(user: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^user_id: "):
        user_id_of(user)
