"""A log whose values a host changes as a whole, by `ALTER COLUMN … TYPE … USING`: no trigger tells of it."""

import pytest
from sqlalchemy import Connection

from billing import db
from billing.attach import attach
from billing.errors import HostChangedError
from billing.mapping import HostMapping
from billing.reconcile import reconcile
from tests.billing.test_host_migrations import PARTITIONED, assert_closed, change_of
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.work import hold_tokens


@pytest.fixture
def user(host: Host, connection: Connection) -> int:
    """A user with a quota of 10,000 tokens and 100 used, whose balance is built."""
    user = host.subscriber()
    host.log(user, 100)
    hold_tokens(connection, user, 0)
    return user


VERSION = "ALTER TABLE ai_usage_log ALTER total_tokens SET STATISTICS 500"
FILES = "VACUUM FULL ai_usage_log"


@pytest.mark.parametrize("changes", [(VERSION, FILES, VERSION), (FILES, VERSION, FILES)])
def test_what_changes_no_values_is_noted_by_each_quick_pass(host: Host, user: int, changes: tuple[str, ...]) -> None:
    reconcile(db.get_engine(), HostMapping())  # corrects the counter
    for change in changes:
        host.execute(change)
        reconcile(db.get_engine(), HostMapping())
    host.execute("ALTER TABLE ai_usage_log ALTER total_tokens TYPE integer USING total_tokens + 1")
    with pytest.raises(HostChangedError, match="given a type or an expression anew"):
        reconcile(db.get_engine(), HostMapping())


def test_what_no_quick_pass_could_tell_apart_from_other_values_closes_the_gate(host: Host, user: int) -> None:
    host.execute(VERSION)
    reconcile(db.get_engine(), HostMapping(), dry_run=True)  # notes nothing
    with db.connect() as own:
        hold_tokens(own, user, 0)
    host.execute(FILES)
    assert_closed(user, "given a type or an expression anew")


def test_a_partitioned_log_whose_values_are_changed_is_noticed(host: Host, user: int) -> None:
    change_of(host, PARTITIONED)
    attach(HostMapping())
    host.execute("CREATE TABLE log_2027 PARTITION OF ai_usage_log FOR VALUES FROM ('2027-01-01') TO ('2028-01-01')")
    for harmless in ("VACUUM FULL log_2027", VERSION):
        host.execute(harmless)
    db.retrying(lambda worker: hold_tokens(worker, user, 1))
    host.execute("ALTER TABLE ai_usage_log ALTER total_tokens TYPE integer USING total_tokens * 2")
    assert_closed(user, "given a type or an expression anew")
    attach(HostMapping())
    assert_true(host)


def test_another_expression_of_a_column_that_says_what_counts_is_noticed(host: Host, user: int) -> None:
    if int(host.value("SELECT current_setting('server_version_num')")) < 170_000:
        pytest.skip("columns get another expression from PostgreSQL 17 on")
    host.execute("ALTER TABLE ai_usage_log ADD billed boolean GENERATED ALWAYS AS (section <> 'free') STORED")
    mapping = HostMapping.model_validate({"usage_log": {"counts": {"expression": "{row}.billed"}}})
    attach(mapping)
    with db.connect() as own:
        hold_tokens(own, user, 1)
    # In the same files, as where such a column is not stored.
    host.execute("UPDATE trueup.installation SET column_versions = 'older'")
    assert_closed(user, "given a type or an expression anew")
    host.execute("UPDATE trueup.installation SET column_versions = (SELECT versions FROM trueup.column_versions())")
    with db.connect() as own:
        hold_tokens(own, user, 1)
    host.execute("ALTER TABLE ai_usage_log ALTER billed SET EXPRESSION AS (section <> 'gift')")
    assert_closed(user, "given a type or an expression anew")
    attach(mapping)
    assert host.value("SELECT consumed FROM trueup.balance") == 100
