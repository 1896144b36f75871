"""A log whose values a host changes as a whole, by `ALTER COLUMN … TYPE … USING`: no trigger tells of it."""

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
    """A user with a quota of 10,000 tokens and 100 used, whose balance is built."""
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
    # Who may not be asked twice is told to ask again.
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
def test_what_changes_no_values_is_noted_by_each_quick_pass(host: Host, user: int, changes: tuple[str, ...]) -> None:
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


def test_a_dry_run_reports_nothing_by_sums_that_stand_still(host: Host, user: int) -> None:
    host.execute(DOUBLED)
    with pytest.raises(LogChangedError):
        reconcile(get_engine(), HostMapping(), dry_run=True)
    assert known(user) == 200


@pytest.mark.parametrize("default", ["", "ALTER TABLE ai_usage_log ALTER billed DROP DEFAULT"])
def test_writing_the_log_anew_closes_no_gate_where_a_column_came_with_a_default(
    host: Host, user: int, default: str
) -> None:
    change_of(host, f"ALTER TABLE ai_usage_log ADD billed boolean NOT NULL DEFAULT true; {default or 'SELECT 1'}")
    attach(HostMapping.model_validate({"usage_log": {"success": "billed"}}))
    # The value that old rows are read with goes into them, and out of the catalog: a new version, in new files.
    host.execute(FILES)
    assert retrying(lambda worker: hold_tokens(worker, user, 9_900)).tokens_left == 9_900


def test_a_partitioned_log_whose_values_are_changed_is_noticed(host: Host, user: int) -> None:
    change_of(host, PARTITIONED)
    attach(HostMapping())
    epoch = host.value(EPOCH)
    assert known(user) == 100
    for harmless in ("VACUUM FULL log_now", VERSION):
        host.execute(harmless)
    assert (known(user), host.value(EPOCH)) == (100, epoch)
    host.execute(DOUBLED)
    assert known(user) == 200
    # The file of one that was away meanwhile is the old one, and tells nothing of the others.
    host.execute("ALTER TABLE ai_usage_log DETACH PARTITION log_now")
    host.execute(DOUBLED)
    host.execute("ALTER TABLE ai_usage_log ATTACH PARTITION log_now FOR VALUES FROM ('2025-01-01') TO (MAXVALUE)")
    assert known(user) == 400
    assert_true(host)


def test_values_that_change_while_trueup_is_set_up_again_are_counted(host: Host, user: int) -> None:
    with host.engine.begin() as setting_up:

        @event.listens_for(setting_up, "before_cursor_execute")
        def change(connection: Connection, cursor: object, statement: str, *rest: object) -> None:
            if "DROP FUNCTION" in statement:
                host.execute(DOUBLED)

        install(setting_up, HostMapping(), with_host_tables=False)
    assert known(user) == host.used(user) == 200


def test_another_expression_of_a_column_that_says_what_counts_is_noticed(host: Host, user: int) -> None:
    if int(host.value("SELECT current_setting('server_version_num')")) < 170_000:
        pytest.skip("columns get another expression from PostgreSQL 17 on")
    host.execute("ALTER TABLE ai_usage_log ADD billed boolean GENERATED ALWAYS AS (section <> 'free') STORED")
    mapping = HostMapping.model_validate({"usage_log": {"counts": {"expression": "{row}.billed"}}})
    attach(mapping)
    epoch = host.value(EPOCH)
    assert (known(user), host.value(EPOCH)) == (100, epoch)
    # In the same files, as where such a column is not stored.
    host.execute("UPDATE trueup.installation SET column_versions = 'older'")
    assert known(user) == 100
    assert host.value(EPOCH) > epoch
    host.execute("ALTER TABLE ai_usage_log ALTER billed SET EXPRESSION AS (section <> 'chat')")
    assert known(user) == 0
    assert host.value("SELECT count(*) FROM ai_usage_log WHERE section = 'chat'") == 1
