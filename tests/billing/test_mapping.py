import pytest
from pydantic import ValidationError

from billing.mapping import HostMapping, SubscriptionTable, quote_identifier, quote_table, render_sql


def test_names_are_quoted_as_postgresql_wants_them() -> None:
    assert quote_identifier('a "b" C') == '"a ""b"" C"'
    assert quote_table('My Schema.the"table') == '"My Schema"."the""table"'


def test_a_template_gets_the_hosts_names_and_their_literals() -> None:
    mapping = HostMapping(subscription=SubscriptionTable(table="app.Sub's", tokens_remaining="left {{user}}"))
    rendered = render_sql("{{subscription}} {{subscription.tokens_remaining}} {{literal subscription}}", mapping)
    assert rendered == '"app"."Sub\'s" "left {{user}}" \'"app"."Sub\'\'s"\''


def test_an_unknown_name_in_a_template_is_an_error() -> None:
    with pytest.raises(KeyError):
        render_sql("{{subscription.nothing}}", HostMapping())


@pytest.mark.parametrize("name", ["", "x" * 64, "ü" * 32, "a\x00b", "cost$$x"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        SubscriptionTable(user_id=name)
    with pytest.raises(ValidationError):
        SubscriptionTable(table=f"app.{name}")


@pytest.mark.parametrize("name", ["x" * 63, "ü" * 31, "a b", "%s", "cost$", 'q"', "select"])
def test_any_other_name_is_taken(name: str) -> None:
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
