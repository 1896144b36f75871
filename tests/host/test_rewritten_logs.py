"""A log whose values the host rewrites with `ALTER COLUMN … TYPE … USING`, which fires no trigger."""

import pytest
from sqlalchemy import Connection, event

from tests.host.test_schema_changes import PARTITIONED, change_of
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.partitioned import known
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import connect, get_engine
from trueup.database.retry import retrying
from trueup.errors import LogChangedError
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile


@pytest.fixture
def user(host: Host, connection: Connection) -> int:
    """Return a user with 100 of 10,000 tokens used, and a balance."""
    user = host.subscriber()
    host.log(user, 100)
    hold_tokens(connection, user, 0)
    return user


EPOCH = "SELECT trueup.log_epoch()"
VERSION = "ALTER TABLE ai_usage_log ALTER total_tokens SET STATISTICS 500"
FILES = "VACUUM FULL ai_usage_log"
DOUBLED = "ALTER TABLE ai_usage_log ALTER total_tokens TYPE integer USING total_tokens * 2"


def test_other_values_count_from_the_next_gate_on(host: Host, connection: Connection, user: int) -> None:
    held = hold_tokens(connection, user, 500)
    host.execute(DOUBLED)
    host.log(user, 7)
    # An operation that is not retried automatically gets an error that says to retry it.
    with pytest.raises(LogChangedError, match="maybe with other values"), connect() as own:
        hold_tokens(own, user, 0)
    charge_tokens(connection, held, 300)
    assert known(user) == host.used(user) == 507
    epoch = host.value(EPOCH)
    host.log(user, 1)
    assert (known(user), host.value(EPOCH)) == (508, epoch)
    assert_true(host)


def test_other_times_count_from_the_next_gate_on(host: Host, user: int) -> None:
    host.execute(
        "ALTER TABLE ai_usage_log ALTER created_at TYPE timestamptz USING created_at - CAST('9 years' AS interval)"
    )
    assert known(user) == 0


@pytest.mark.parametrize("changes", [(VERSION, FILES, VERSION), (FILES, VERSION, FILES)])
def test_a_change_of_the_schema_without_new_values_is_recorded_by_each_quick_pass(
    host: Host, user: int, changes: tuple[str, ...]
) -> None:
    epoch = host.value(EPOCH)
    for change in changes:
        host.execute(change)
        reconcile(get_engine(), HostMapping())
    with connect() as own:
        hold_tokens(own, user, 0)
    assert host.value(EPOCH) == epoch
    host.execute(DOUBLED)
    reconcile(get_engine(), HostMapping())
    assert host.value("SELECT expected FROM trueup.drift ORDER BY id DESC LIMIT 1") == 10_000 - 200


def test_a_dry_run_reports_no_drift_from_outdated_sums(host: Host, user: int) -> None:
    host.execute(DOUBLED)
    with pytest.raises(LogChangedError):
        reconcile(get_engine(), HostMapping(), dry_run=True)
    assert known(user) == 200


@pytest.mark.parametrize("default", ["", "ALTER TABLE ai_usage_log ALTER billed DROP DEFAULT"])
def test_a_rewrite_of_the_log_after_adding_a_column_with_a_default_closes_no_gate(
    host: Host, user: int, default: str
) -> None:
    change_of(host, f"ALTER TABLE ai_usage_log ADD billed boolean NOT NULL DEFAULT true; {default or 'SELECT 1'}")
    attach(HostMapping.model_validate({"usage_log": {"success": "billed"}}))
    # The rewrite moves the default from the catalog into the old rows: new column versions, in new files.
    host.execute(FILES)
    assert retrying(lambda worker: hold_tokens(worker, user, 9_900)).tokens_left == 9_900


def test_a_rewrite_of_a_partitioned_log_is_detected(host: Host, user: int) -> None:
    change_of(host, PARTITIONED)
    attach(HostMapping())
    epoch = host.value(EPOCH)
    assert known(user) == 100
    for harmless in ("VACUUM FULL log_now", VERSION):
        host.execute(harmless)
    assert (known(user), host.value(EPOCH)) == (100, epoch)
    host.execute(DOUBLED)
    assert known(user) == 200
    # A partition that was detached in the meantime has its old file, which proves nothing about the others.
    host.execute("ALTER TABLE ai_usage_log DETACH PARTITION log_now")
    host.execute(DOUBLED)
    host.execute("ALTER TABLE ai_usage_log ATTACH PARTITION log_now FOR VALUES FROM ('2025-01-01') TO (MAXVALUE)")
    assert known(user) == 400
    assert_true(host)


def test_values_that_change_during_a_repeated_setup_are_counted(host: Host, user: int) -> None:
    with host.engine.begin() as setting_up:

        @event.listens_for(setting_up, "before_cursor_execute")
        def change(connection: Connection, cursor: object, statement: str, *rest: object) -> None:
            if "DROP FUNCTION" in statement:
                host.execute(DOUBLED)

        install(setting_up, HostMapping(), with_host_tables=False)
    assert known(user) == host.used(user) == 200


def test_a_new_expression_of_a_computed_column_in_the_condition_is_detected(host: Host, user: int) -> None:
    if int(host.value("SELECT current_setting('server_version_num')")) < 170_000:
        pytest.skip("columns get another expression from PostgreSQL 17 on")
    host.execute("ALTER TABLE ai_usage_log ADD billed boolean GENERATED ALWAYS AS (section <> 'free') STORED")
    mapping = HostMapping.model_validate({"usage_log": {"counts": {"expression": "{row}.billed"}}})
    attach(mapping)
    epoch = host.value(EPOCH)
    assert (known(user), host.value(EPOCH)) == (100, epoch)
    # In the same files, as for a column that is not stored.
    host.execute("UPDATE trueup.installation SET column_versions = 'older'")
    assert known(user) == 100
    assert host.value(EPOCH) > epoch
    host.execute("ALTER TABLE ai_usage_log ALTER billed SET EXPRESSION AS (section <> 'chat')")
    assert known(user) == 0
    assert host.value("SELECT count(*) FROM ai_usage_log WHERE section = 'chat'") == 1
