import tomllib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from pydantic import ValidationError
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from trueup.host.fields import SubscriptionTable
from trueup.host.mapping import HostMapping, quote_identifier, quote_table
from trueup.host.setting_values import Compared, quote_literal
from trueup.host.sql import render_sql, render_statement
from trueup.install.install import run_scripts
from trueup.stack import StackUrls


def test_names_are_quoted_as_postgresql_wants_them() -> None:
    assert quote_identifier('a "b" C') == '"a ""b"" C"'
    assert quote_table('My Schema.the"table') == '"My Schema"."the""table"'


def test_a_template_gets_the_hosts_names_and_their_literals() -> None:
    mapping = HostMapping(subscription=SubscriptionTable(table="app.Sub's", tokens_remaining="left {{user}}"))
    rendered = render_sql(
        "{{ subscription }} {{ subscription.tokens_remaining }} {{ subscription | literal }}", mapping
    )
    assert rendered == '"app"."Sub\'s" "left {{user}}" \'"app"."Sub\'\'s"\''


def test_an_unknown_name_in_a_template_is_an_error() -> None:
    for name in ("subscription.nothing", "nothing", "subscription.table"):
        with pytest.raises(UndefinedError):
            render_sql(f"{{{{ {name} }}}}", HostMapping())


@pytest.mark.parametrize("name", ["", "x" * 64, "ü" * 32, "a\x00b", "cost$$x"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        SubscriptionTable(user_id=name)
    with pytest.raises(ValidationError):
        SubscriptionTable(table=f"app.{name}")


@pytest.mark.parametrize("name", ["x" * 63, "ü" * 31, "a b", "%s", "cost$", 'q"', "select"])
def test_any_other_name_is_accepted(name: str) -> None:
    assert SubscriptionTable(user_id=name).user_id == name


@pytest.mark.parametrize("table", [".", "a.", ".b", "a.b.c"])
def test_a_table_is_one_name_or_two(table: str) -> None:
    with pytest.raises(ValidationError):
        SubscriptionTable(table=table)


def test_the_fingerprint_changes_with_any_name() -> None:
    mapping = HostMapping()
    assert mapping.fingerprint() == HostMapping().fingerprint()
    assert mapping.fingerprint() != HostMapping(user_id_type="text").fingerprint()
    assert mapping.fingerprint() != HostMapping(subscription=SubscriptionTable(id="pk")).fingerprint()


def written(toml: str) -> HostMapping:
    return HostMapping.model_validate(tomllib.loads(toml))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("success = {value = false}", "give a column's name or {value = true}"),
        ("success = {value = 1}", "give a column's name or {value = true}"),
        ("success = {vlaue = true}", "give a column's name or {value = true}"),
        ("success = {value = true, table = 'x'}", "table: Extra inputs are not permitted"),
        ("success = {expression = 'true'}", "give a column's name or {value = true}"),
        ("success = ''", "'' is no PostgreSQL name"),
        ("section = {value = 5}", 'give a column\'s name or {value = "…"}'),
        ("section = {value = 'a$$b'}", "contains NUL or $$"),
        ("prompt_tokens = {value = -1}", "give a column's name or {value = 0}"),
        ("prompt_tokens = {value = true}", "give a column's name or {value = 0}"),
        ("metadata = {value = {a = 1}}", "value: Input should be a valid"),
        ("total_tokens = {value = 5}", "Input should be a valid string"),
        ("counts = 'success'", "give {column = "),
        ("counts = {column = 'a', equals = []}", "equals: give one value or more"),
        ("counts = {column = 'a', equals = ['x', 'y'], failed = 'y'}", "failed: 'y' would count"),
        ("counts = {column = 'a'}", "equals: Field required"),
        ("counts = {column = 'a', equals = 1.5}", "equals: Input should be a valid string"),
        ("counts = {expression = ' '}", "expression is empty"),
        ("counts = {expression = '{row}.a; DROP TABLE x'}", "contains ;"),
        ("counts = {expression = '{row}.a -- b'}", "contains --"),
        ("counts = {expression = '{row}.a /* b'}", "contains /*"),
        ("counts = {expression = 'a = $1'}", "contains $"),
        ("counts = {expression = '{row}.a = $$x$$'}", "contains $"),
        ("counts = {expression = '{row} IS NULL'}", "name the row's columns as {row}.column"),
        ("counts = {expression = '{subscription.id} = 1'}", "name the row's columns as {row}.column"),
        ("counts = {expression = '{row}.a) OR (true'}", "a ) too many"),
        ("counts = {expression = '({row}.a'}", "a ( is left open"),
        ('counts = {expression = "{row}.a = \'x"}', "a ' is left open"),
        ("counts = {expression = \"{row}.a = E'x'\"}", "without E or U&"),
        ("counts = {expression = \"{row}.a = '$$'\"}", "contains NUL or $$"),
    ],
)
def test_a_malformed_setting_of_a_column_is_refused_with_the_remedy(setting: str, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        written(f"[usage_log]\n{setting}")
    [fault] = refused.value.errors()
    assert fault["loc"] == ("usage_log", setting.partition(" ")[0])
    assert said in fault["msg"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("counter = 7", 'counter: give a column\'s name, or {column = "NAME", counts = "up"}'),
        ("counter = {column = 'used', counts = 'sideways'}", 'counts is "up" (used tokens) or "down" (tokens left)'),
        ("counter = {column = 'used', count = 'up'}", "counter: give a column's name"),
        ("counter = 'used'\ntokens_remaining = 'left'", "give counter or tokens_remaining, not both"),
        ("unlimited = 5", "a positive number is a number of tokens"),
        ("unlimited = 'none'", 'give -1, 0 or "null", or {included = -1, counter = -1}'),
        ("unlimited = {}", 'give -1, 0 or "null"'),
        ("unlimited = {counter = 0}", "a counter of 0 is a number of tokens"),
        ("period = 'month'", 'give {every = "month", anchor = "start_date" or "first"'),
        ("period = {every = 'week'}", 'give {every = "month"'),
        ("period = {every = 'month', time_zone = 'Asia/Teheran'}", "did you mean Asia/Tehran?"),
        ("counter_kept_by = 'me'", "Input should be 'host' or 'trueup'"),
    ],
)
def test_a_malformed_setting_of_a_subscription_is_refused_with_the_remedy(setting: str, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        written(f"[subscription]\n{setting}")
    [fault] = refused.value.errors()
    assert fault["loc"][0] == "subscription"
    assert said in fault["msg"]


def test_the_sum_of_plans_needs_both_kinds() -> None:
    with pytest.raises(ValidationError, match="adds two plans: map token_plan and full_plan"):
        written("token_plan = false\n[subscription]\ntokens_included = 'sum'")


@pytest.mark.parametrize("counter", ["'used'", "{column = 'used'}", "{column = 'used', counts = 'down'}"])
def test_a_counter_is_a_column_that_counts_down_by_default(counter: str) -> None:
    names = written(f"[subscription]\ncounter = {counter}").subscription
    assert (names.tokens_remaining, names.counts in (None, "down")) == ("used", True)


def test_without_plans_the_tokens_of_a_subscription_must_be_mapped() -> None:
    with pytest.raises(ValidationError, match="set subscription\\.tokens_included"):
        written("token_plan = false\nfull_plan = false")
    for said in ('"quota"', "{value = 0}", '{expression = "{row}.a"}'):
        mapping = written(f"token_plan = false\nfull_plan = false\n[subscription]\ntokens_included = {said}")
        assert mapping.columns("token_plan") == []
        assert not {"token_plan_id", "full_plan_id"} & set(dict(mapping.columns("subscription")))


def test_a_mapping_is_the_same_after_a_round_trip_through_json() -> None:
    mapping = written(
        """
        user = false
        [subscription]
        tokens_included = {expression = '{row}."Base" + {row}.Bonus'}
        end_date = {value = "infinity"}
        [usage_log]
        metadata = {value = {}}
        counts = {column = "status", equals = ["ok", 3, true], failed = 4}
        """
    )
    assert HostMapping.model_validate_json(mapping.model_dump_json()) == mapping
    assert mapping.columns("subscription")[-2:] == [("tokens_included", "Base"), ("tokens_included", "bonus")]
    assert mapping.usage_log.counts == Compared(column="status", equals=("ok", "3", "true"), failed="4")
    assert "success" not in mapping.usage_log.written


def test_a_mapping_without_the_newer_settings_has_the_fingerprint_that_it_had() -> None:
    """Otherwise an upgrade would close the gate of each installation."""
    assert HostMapping().fingerprint() == "d5d81bb04544b146"
    odd = HostMapping(user_id_type="text", subscription=SubscriptionTable(id="ü:%"))
    assert odd.fingerprint() == "e76d70ddfb8f6e44"


def test_the_fingerprint_covers_the_replacements_of_columns() -> None:
    prints = {
        written(toml).fingerprint()
        for toml in (
            "",
            "user = false",
            "[usage_log]\nsuccess = {value = true}",
            "[usage_log]\nsection = {value = 'a'}",
            "[usage_log]\nsection = {value = 'b'}",
            "[usage_log]\ncounts = {column = 'a', equals = 'b'}",
            "[usage_log]\ncounts = {column = 'a', equals = 'b', failed = 'c'}",
            "[usage_log]\ncounts = {expression = '{row}.a'}",
            "[subscription]\ntokens_included = 'a'",
            "[subscription]\ntokens_included = {value = 1}",
            "[subscription]\ntokens_included = {expression = '{row}.a'}",
        )
    }
    assert len(prints) == 11


@pytest.mark.parametrize(
    ("success", "counts", "tells"),
    [
        ('"success"', "", True),
        ("{value = true}", "", False),
        ('"ok"', "{column = 'a', equals = 'b', failed = 'c'}", True),
        ('"ok"', "{column = 'a', equals = 'b'}", False),
        ('"ok"', "{expression = '{row}.a'}", True),
        ("{value = true}", "{expression = '{row}.a'}", False),
    ],
)
def test_failed_calls_get_a_row_if_it_can_record_the_failure(success: str, counts: str, tells: bool) -> None:
    log = written(f"[usage_log]\nsuccess = {success}\n{f'counts = {counts}' if counts else ''}").usage_log
    assert log.records_failure is tells


# Texts that hosts may have in names and values. A name has at most 63 bytes.
NASTY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=15) | st.sampled_from(
    ["'", '"', "\\", ":a", "%s", "%%", "{{user}}", "{% if", "{#", "{row}.a", "$1", "--", "/*", "';", "ü" * 15, "$"]
)
VALUE = NASTY.filter(lambda value: "$$" not in value)
NAME = VALUE.filter(bool)


@pytest.fixture(scope="module")
def server(stack: StackUrls) -> Iterator[Connection]:
    assert stack.database_url is not None
    engine = create_engine(stack.database_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@settings(max_examples=60, deadline=None)
@given(value=VALUE, other=VALUE, name=NAME)
def test_values_and_names_of_any_kind_reach_the_database_as_they_are(
    server: Connection, value: str, other: str, name: str
) -> None:
    values = (value, f"x{other}", f"{other}y")
    if len(set(values)) < 3:
        return
    column = quote_identifier(name)
    expression = f"CASE WHEN {{row}}.{column} = 'it''s :a %s' THEN 1 ELSE 2 END"
    mapping = HostMapping.model_validate(
        {
            "usage_log": {
                "section": {"value": value},
                "counts": {"column": name, "equals": values[:2], "failed": values[2]},
            },
            "subscription": {"tokens_included": {"expression": expression}},
        }
    )
    asked = (
        'SELECT {{ usage_log.section("l") }}, {{ usage_log.success("l") }}, '
        '{{ subscription.tokens_included("l") }} FROM '
    )
    for said, counts in zip((*values, None), (True, True, False, None), strict=True):
        row = f"(SELECT CAST({'NULL' if said is None else quote_literal(said)} AS text) AS {column}) l"
        # As a statement with parameters, and in the body of a function.
        statement = text(render_statement(asked, mapping).text + row.replace(":", "\\:"))
        made = "CREATE OR REPLACE FUNCTION pg_temp.f(OUT text, OUT boolean, OUT integer) LANGUAGE sql AS $$"
        run_scripts(server, [f"{made}{render_sql(asked, mapping)}{row}$$"])
        for found in (server.execute(statement).one(), server.execute(text("SELECT * FROM pg_temp.f()")).one()):
            assert tuple(found) == (value, counts, 2)
