"""Active subscriptions of hosts without a flag: by a status or an expression."""

import pytest
from pydantic import ValidationError
from sqlalchemy import Engine

from tests.host.test_expressions import (
    engine,  # noqa: F401 - a fixture
    mapped,
    problems,
)
from trueup.errors import InvalidInputError, NotInstalledError
from trueup.host.expressions import wrong_expression
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import check_host

pytestmark = pytest.mark.dated

STATE = 'ALTER TABLE app."Subs" ADD state app.state, ADD gone timestamp, ADD word text, ADD more jsonb'


def active(said: object) -> HostMapping:
    mapping = mapped()
    given = mapping.model_dump()
    return HostMapping.model_validate(given | {"subscription": given["subscription"] | {"is_active": said}})


def test_a_status_or_an_expression_over_the_row_is_accepted(engine: Engine) -> None:  # noqa: F811
    with engine.begin() as connection:
        connection.exec_driver_sql(STATE)
    good = [
        {"column": "state", "equals": ["ok", "late"]},
        {"column": "word", "equals": "active"},
        {"column": "base", "equals": 1},
        {"expression": "{row}.state = 'ok' AND {row}.gone IS NULL"},
        {"expression": "{row}.base > 0"},
        {"expression": "{row}.more->>'on' = 'true' AND jsonb_typeof({row}.more->'list') = 'array'"},
    ]
    assert set(problems(engine, {str(one): active(one) for one in good}).values()) == {None}
    with engine.begin() as connection:
        for one in good:
            check_host(connection, active(one))
            assert wrong_expression(connection, active(one)) is None


def test_an_unusable_condition_is_refused_with_the_setting_and_the_remedy(engine: Engine) -> None:  # noqa: F811
    with engine.begin() as connection:
        connection.exec_driver_sql(STATE)
    bad = {
        "{row}.state": "its type is app.state. Cast it: it must be boolean",
        "{row}.trial_end > now()": "it does not always return the same value for the same row",
        "CAST({row}.word AS boolean)": "it casts text or jsonb, which may fail for a row",
        "CAST({row}.more->'on' AS boolean)": "it casts text or jsonb, which may fail for a row",
        "jsonb_array_length({row}.more) > 0": "it casts text or jsonb, which may fail for a row",
        "{row}.base / {row}.gift > 1": "it divides by a value that may be 0 for a row",
        "EXISTS (SELECT FROM app.log)": "it reads more than its row",
    }
    said = problems(engine, {one: active({"expression": one}) for one in bad})
    for one, words in bad.items():
        assert f"host.subscription.is_active: {words}" in str(said[one])
    with (
        engine.begin() as connection,
        pytest.raises(NotInstalledError, match=r"host\.subscription\.is_active: invalid input"),
    ):
        check_host(connection, active({"column": "state", "equals": ["OK"]}))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"value": False}, "give a column's name or {value = true} or {column ="),
        ({"column": "state", "equals": "ok", "failed": "late"}, "failed: leave it out"),
        ({"column": "state", "equals": []}, "equals: give one value or more"),
        ({"expression": "{row}.a; x"}, "contains ;"),
    ],
)
def test_a_malformed_value_is_refused_in_the_settings(said: object, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        active(said)
    assert words in refused.value.errors()[0]["msg"]


def test_an_example_table_has_the_status_but_none_for_an_expression() -> None:
    for column in ("status", "phase"):
        mapping = HostMapping.model_validate(
            {"subscription": {"is_active": {"column": column, "equals": ["on", "test"]}}}
        )
        table = build_host_metadata(mapping).tables["public.billing_subscription"]
        assert "is_active" not in table.c
        assert str(table.c[column].server_default.arg) == "on"  # type: ignore[union-attr]
    with pytest.raises(InvalidInputError, match="can't create an example table for an expression"):
        build_host_metadata(HostMapping.model_validate({"subscription": {"is_active": {"expression": "{row}.a"}}}))
