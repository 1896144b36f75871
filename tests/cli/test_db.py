"""`trueup db init`."""

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup


def tables(url: str) -> set[str]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        names = connection.scalars(
            text("SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname IN ('public', 'trueup')")
        )
        return set(names)


def test_an_empty_database_is_made_ready_and_may_be_made_so_again(empty_database: str) -> None:
    for _ in range(2):
        assert trueup("db", "init", "--with-host-tables").stdout.startswith("Ready: host tables, tables, functions")
    assert {"public.ai_usage_log", "trueup.balance"} <= tables(empty_database)
    # As a host with tables of its own, from here on.
    assert trueup("db", "init").stdout.startswith("Ready: tables, functions")
    trueup("tokens", "check", 1, code=3)


def test_without_host_tables_nothing_is_made_and_each_is_named(empty_database: str) -> None:
    result = trueup("db", "init", code=1)
    for name in ("accounts_user", "billing_tokenplan", "billing_subscription", "ai_usage_log", "--with-host-tables"):
        assert name in result.stderr
    assert tables(empty_database) == set()


@pytest.mark.parametrize(
    "command",
    [("tokens", "show", 1), ("holds", "list"), ("usage", "list", 1), ("reconcile",), ("drift", "report")],
    ids=lambda command: command[0],
)
def test_before_the_setup_each_command_names_the_remedy(empty_database: str, command: tuple[object, ...]) -> None:
    assert "Run `trueup db attach`" in trueup(*command, code=1).stderr
