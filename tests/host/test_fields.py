"""The registry of the host's fields: an entry has all facts that other code needs about a column."""

import pytest

from trueup.host.fields import FIELDS, NOUNS, TABLES, Kind, Noun, PaymentTable, TokenUsageTable, kind_of, types_of
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata

# Settings of a table that are no columns.
NO_COLUMN = {"table", "completed_status"}
SETTINGS: dict[Noun, set[str]] = {
    "subscription": {"plans", "counts", "unlimited", "counter_kept_by", "period"},
    "usage_log": {"record", "section_type"},
}
COMPLETE = HostMapping(token_usage=TokenUsageTable(table="decrements"), payment=PaymentTable(table="payments"))


@pytest.mark.parametrize("noun", NOUNS)
def test_each_column_of_the_mapping_has_an_entry(noun: Noun) -> None:
    assert set(FIELDS[noun]) == set(TABLES[noun].model_fields) - NO_COLUMN - SETTINGS.get(noun, set())


@pytest.mark.parametrize("noun", NOUNS)
def test_an_entry_is_enough_for_the_example_tables(noun: Noun) -> None:
    made = build_host_metadata(COMPLETE).tables[f"public.{getattr(COMPLETE, noun).table}"]
    assert {column for _, column in COMPLETE.columns(noun)} <= {column.name for column in made.columns}


@pytest.mark.parametrize("noun", NOUNS)
def test_a_required_column_has_no_substitute(noun: Noun) -> None:
    for name, entry in FIELDS[noun].items():
        assert not (entry.required and entry.substitute is not None), name
        assert entry.required or entry.use or not entry.is_sought, f"{name} has no use"


@pytest.mark.parametrize("noun", NOUNS)
def test_no_synonym_is_listed_twice(noun: Noun) -> None:
    for name, entry in FIELDS[noun].items():
        assert len(entry.names) == len({name, *entry.names}) - 1, name


@pytest.mark.parametrize("kind", ["integer", "text", "time", "number", "uuid", "boolean", "json"])
def test_kinds_and_types_are_two_sides_of_one_table(kind: Kind) -> None:
    assert {kind_of(name) for name in types_of([kind])} == {kind}
