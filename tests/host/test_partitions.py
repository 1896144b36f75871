"""A partitioned usage log: all ways to insert, delete and move rows, and to attach and detach partitions."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, make_url, text

from tests.conftest import cloned_database, settings_for
from tests.install.test_triggers import consumed
from tests.support.books import assert_true
from tests.support.dumps import pg_dump
from tests.support.host import pooled_engine
from tests.support.partitioned import DECEMBER, NOVEMBER, PARTS, ROW, PartitionedHost, known, month, new_host
from tests.support.sessions import locked
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.database.engine import connect, get_engine
from trueup.database.locks import take_step
from trueup.database.retry import retrying
from trueup.doctor.host import check_mapping
from trueup.doctor.installation import check_triggers
from trueup.errors import NotInstalledError
from trueup.host.fields import UsageLogTable
from trueup.host.mapping import HostMapping
from trueup.install.attach import AttachError, attach, open_gate, prepare
from trueup.install.detach import detach, plan_detach
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import drop_functions, install
from trueup.install.rights import RoleNames, grants_sql
from trueup.reconcile.audit import read_defects
from trueup.reconcile.local_run import reconcile
from trueup.settings.settings import get_settings
from trueup.stack import StackUrls
from trueup.usage.tracker import track_ai_usage

pytestmark = pytest.mark.dated

MAPPINGS = {kind: HostMapping(usage_log_id_type=kind) for kind in ("uuid", "bigint")}
EPOCH = "SELECT trueup.log_epoch()"
CHILDS = "SELECT oid, xmin::text FROM pg_trigger WHERE tgrelid = 'child'::regclass ORDER BY 1"
MOVED_BY_HAND = f"""
    WITH gone AS (DELETE FROM log_11a RETURNING *)
    INSERT INTO "Log 12" {ROW.split(" VALUES")[0]} SELECT user_id, section, total_tokens, '2024-12-08Z' FROM gone
"""
FOREIGN = """
    CREATE FOREIGN DATA WRAPPER away; CREATE SERVER away FOREIGN DATA WRAPPER away;
    CREATE TABLE spread (LIKE ai_usage_log INCLUDING DEFAULTS) PARTITION BY RANGE (created_at);
    CREATE FOREIGN TABLE far PARTITION OF spread
    FOR VALUES FROM ('2024-01-01Z') TO ('2024-02-01Z') SERVER away
"""


@pytest.fixture
def bare(empty_database: str) -> Iterator[PartitionedHost]:
    """Yield the host before the setup of trueup."""
    with new_host(empty_database, HostMapping()) as host:
        yield host


@pytest.fixture(scope="module")
def template(stack: StackUrls, admin_engine: Engine) -> Iterator[str]:
    """Yield the name of a template database of the host with trueup, created once."""
    with cloned_database(stack, admin_engine, "template1") as url:
        with new_host(url, HostMapping()) as host:
            host.set_up()
        yield str(make_url(url).database)


@pytest.fixture
def host(
    stack: StackUrls, admin_engine: Engine, template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[PartitionedHost]:
    with (
        cloned_database(stack, admin_engine, template) as url,
        settings_for(url, stack, monkeypatch, tmp_path),
        PartitionedHost(pooled_engine(url)) as host,
    ):
        host.mapping = HostMapping()
        yield host


@pytest.fixture
def connection(host: PartitionedHost) -> Iterator[Connection]:
    with connect() as connection:
        yield connection


@pytest.fixture
def user(host: PartitionedHost, connection: Connection) -> int:
    """Return a user with 1,000 of 10,000 tokens used and a balance, so later usage arrives as deltas."""
    user = host.subscriber(10_000)
    host.write(user, 1_000)
    hold_tokens(connection, user, 0, task="warm-up")
    return user


def test_every_partition_has_triggers_and_each_way_to_insert_counts_once(
    host: PartitionedHost, connection: Connection, user: int
) -> None:
    assert host.triggered() == sorted(["ai_usage_log", *PARTS])
    for tokens, table in enumerate(("ai_usage_log", "log_11", "log_11a"), 1):
        host.write(user, tokens, into=table)
    host.write(user, 10, at=DECEMBER)
    host.write(user, 20, into='"Log 12"', at=DECEMBER)
    host.write(user, 40, into="log_default", at=datetime(2025, 3, 1, tzinfo=UTC))
    host.write(user, 999, into="log_10", at=datetime(2024, 10, 9, tzinfo=UTC))  # before the window
    assert consumed(host, connection, user) == 1_076


@pytest.mark.parametrize(
    ("statement", "total"),
    [
        ("UPDATE ai_usage_log SET total_tokens = 7", 14),
        ("UPDATE log_11a SET total_tokens = 7", 2_007),
        ("UPDATE log_11 SET total_tokens = total_tokens + 1", 3_001),
        ("UPDATE ai_usage_log SET created_at = '2024-12-07Z'", 3_000),
        ("UPDATE ai_usage_log SET created_at = '2024-12-07Z', total_tokens = 5 WHERE total_tokens = 1000", 2_005),
        ("UPDATE ai_usage_log SET created_at = '2024-10-07Z' WHERE total_tokens = 1000", 2_000),
        ("DELETE FROM ai_usage_log WHERE total_tokens = 2000", 1_000),
        ("DELETE FROM log_11a", 2_000),
        ("DELETE FROM log_11", 2_000),
        ("TRUNCATE log_11a", 2_000),
        ("TRUNCATE log_11", 2_000),
        ("TRUNCATE ai_usage_log", 0),
        (MOVED_BY_HAND, 3_000),
    ],
)
def test_updated_moved_and_deleted_rows_count_with_their_current_values(
    host: PartitionedHost, connection: Connection, user: int, statement: str, total: int
) -> None:
    host.write(user, 2_000, at=DECEMBER)
    raw = host.connection.connection.driver_connection
    assert raw is not None
    raw.execute(statement)
    assert consumed(host, connection, user) == total


def test_a_row_that_is_given_to_another_user_moves_its_tokens(
    host: PartitionedHost, connection: Connection, user: int
) -> None:
    other = host.subscriber()
    hold_tokens(connection, other, 0)
    host.execute("UPDATE log_11 SET user_id = :other, created_at = '2024-11-16Z'", other=other)
    assert host.value("SELECT count(*) FROM log_11b") == 1
    assert (consumed(host, connection, user), consumed(host, connection, other)) == (0, 1_000)


def test_a_user_deleted_with_all_rows_leaves_true_books(host: PartitionedHost, user: int) -> None:
    host.execute("ALTER TABLE billing_subscription DROP CONSTRAINT billing_subscription_user_id_fkey")
    host.execute("DELETE FROM accounts_user WHERE id = :user", user=user)
    assert host.used(user) == 0
    assert_true(host, host.mapping)


@pytest.mark.parametrize("kind", MAPPINGS)
def test_trueups_own_rows_are_inserted_through_the_log_and_count_once(
    empty_database: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("TRUEUP_HOST__USAGE_LOG_ID_TYPE", kind)
    get_settings.cache_clear()
    with new_host(empty_database, MAPPINGS[kind]) as host, connect() as connection:
        host.set_up()
        user = host.subscriber(10_000)
        hold = hold_tokens(connection, user, 1_000)
        assert charge_tokens(connection, hold, 200).recorded
        assert not charge_tokens(connection, hold, 200).recorded
        report = {"section": "chat", "prompt_tokens": 30, "completion_tokens": 10, "model_name": "m", "key": "k"}
        first, again = track_ai_usage(user, **report), track_ai_usage(user, **report)
        assert (first.recorded, again.recorded, again.differs, again.log_id) == (True, False, False, first.log_id)
        assert host.value("SELECT count(*) FROM trueup.usage_delta") == 0
        assert (host.used(user), balance(host, user), host.counter(user)) == (240, (240, 800), 9_760)
        deep = reconcile(get_engine(), host.mapping, kind="deep")
        assert (deep.drifted, deep.defects) == (0, 0)


def test_the_host_writes_into_partitions_during_an_upgrade_of_the_functions(
    host: PartitionedHost, connection: Connection, user: int
) -> None:
    with host.engine.begin() as swapping:
        drop_functions(swapping)
    host.write(user, 5, into="log_11")
    host.execute("UPDATE log_11 SET total_tokens = 6 WHERE total_tokens = 5; DELETE FROM log_11 WHERE total_tokens = 6")
    host.set_up()
    assert consumed(host, connection, user) == 1_000


def test_usage_of_a_detached_partition_counts_until_the_next_deep_pass(
    host: PartitionedHost, connection: Connection, user: int
) -> None:
    host.write(user, 300, at=DECEMBER)
    host.execute('ALTER TABLE ai_usage_log DETACH PARTITION "Log 12"')
    assert known(user) == 1_300
    # Rows written there from now on are not part of the log.
    host.write(user, 50, into='"Log 12"', at=DECEMBER)
    host.execute('UPDATE "Log 12" SET total_tokens = 7')
    host.execute('DELETE FROM "Log 12" WHERE total_tokens = 7')
    before = host.value(EPOCH)
    host.execute('TRUNCATE "Log 12"')
    assert (host.value(EPOCH), known(user)) == (before, 1_300)
    assert check_triggers_of(connection) == [("ok", None)]
    deep = reconcile(get_engine(), host.mapping, kind="deep")
    assert deep.run_id is not None
    [defect] = read_defects(connection, "bigint", deep.run_id)
    assert (defect.kind, defect.seen, defect.expected, defect.repaired) == ("balance_untrue", 1_300, 1_000, True)
    assert consumed(host, connection, user) == 1_000


def test_a_dropped_partition_is_like_a_detached_one(host: PartitionedHost, connection: Connection, user: int) -> None:
    host.execute("ALTER TABLE ai_usage_log DETACH PARTITION log_11")
    for table in ("log_11", "log_11a"):  # rows in a detached partition with its own partitions don't count either
        host.write(user, 50, into=table)
    host.execute("DROP TABLE log_11")
    assert known(user) == 1_000
    assert reconcile(get_engine(), host.mapping, kind="deep").defects == 1
    assert consumed(host, connection, user) == 0


def check_triggers_of(connection: Connection) -> list[tuple[str, list[str] | None]]:
    return [(one.level, one.detail.get("partitions")) for one in check_triggers(connection, get_settings())]


def test_an_attached_partition_is_reported_once_a_day_and_has_triggers_after_the_next_attach(
    host: PartitionedHost, connection: Connection, user: int
) -> None:
    host.execute('ALTER TABLE ai_usage_log DETACH PARTITION "Log 12"; DROP TABLE "Log 12"')
    host.execute("CREATE TABLE more (LIKE ai_usage_log INCLUDING ALL)")
    host.write(user, 400, into="more", at=DECEMBER)
    host.execute(f"ALTER TABLE ai_usage_log ATTACH PARTITION more {month(12)}")
    host.write(user, 30, at=DECEMBER)
    host.write(user, 5, into="more", at=DECEMBER)
    look = reconcile(get_engine(), host.mapping, dry_run=True)
    assert [(defect.kind, defect.detail) for defect in look.defect_rows] == [
        ("partition_uncovered", {"partition": "public.more"})
    ]
    assert reconcile(get_engine(), host.mapping, only_user=user).defects == 0
    assert [reconcile(get_engine(), host.mapping).defects for _ in range(2)] == [1, 0]
    host.execute("UPDATE trueup.defect SET found_at = found_at - interval '25 hours'")
    assert reconcile(get_engine(), host.mapping).defects == 1
    assert check_triggers_of(connection) == [("warning", ["public.more"])]
    attach(host.mapping)
    assert consumed(host, connection, user) == 1_435
    host.write(user, 1, into="more", at=DECEMBER)
    assert consumed(host, connection, user) == 1_436
    assert check_triggers_of(connection) == [("ok", None)]
    assert reconcile(get_engine(), host.mapping, kind="deep").defects == 0


def test_partitions_made_in_advance_are_covered_without_closing_the_gate_or_touching_a_balance(
    host: PartitionedHost, connection: Connection, user: int
) -> None:
    host.execute("CREATE TABLE log_25 PARTITION OF ai_usage_log FOR VALUES FROM ('2025-01-01Z') TO ('2025-02-01Z')")
    with pytest.raises(AttachError, match="A trigger is missing"):
        take_step(lambda again: open_gate(again, host.mapping))
    before = host.value(EPOCH)
    with locked(host, "LOCK TABLE ONLY ai_usage_log IN ROW EXCLUSIVE MODE"):
        take_step(lambda again: prepare(again, host.mapping), patience_seconds=0)
        retrying(lambda worker: hold_tokens(worker, user, 0))
        assert attach(host.mapping, patience_seconds=0) == {"balances": 0}
    assert (host.value(EPOCH), "log_25" in host.triggered()) == (before, True)
    host.write(user, 2, into="log_25", at=datetime(2025, 1, 3, tzinfo=UTC))
    assert consumed(host, connection, user) == 1_002


def test_a_disabled_trigger_on_a_partition_is_found_and_enabled_again(
    host: PartitionedHost, connection: Connection, user: int
) -> None:
    host.execute("ALTER TABLE log_11a DISABLE TRIGGER trueup_deleted; DELETE FROM log_11a")
    assert check_triggers_of(connection) == [("warning", ["public.log_11a"])]
    host.write(user, 3)
    attach(host.mapping)
    assert consumed(host, connection, user) == 3


def test_a_log_that_becomes_a_partition_of_its_successor_counts_after_a_repeated_setup(
    empty_database: str,
) -> None:
    engine = pooled_engine(empty_database)
    with engine.begin() as setup:
        install(setup, HostMapping(), with_host_tables=True)
    with PartitionedHost(engine) as host, connect() as connection:
        host.mapping = HostMapping()
        user = host.subscriber(10_000)
        host.write(user, 100)
        hold_tokens(connection, user, 0)
        host.execute(
            "ALTER TABLE ai_usage_log RENAME TO log_old; "
            "CREATE TABLE ai_usage_log (LIKE log_old INCLUDING DEFAULTS) PARTITION BY RANGE (created_at); "
            "ALTER TABLE ai_usage_log ATTACH PARTITION log_old FOR VALUES FROM (MINVALUE) TO ('2024-12-01Z'); "
            f"CREATE TABLE log_12 PARTITION OF ai_usage_log {month(12)}"
        )
        host.write(user, 20)
        attach(host.mapping)
        assert host.triggered() == ["ai_usage_log", "log_12", "log_old"]
        host.write(user, 3)
        host.write(user, 4, into="log_old")
        assert consumed(host, connection, user) == 127
        host.execute("ALTER TABLE ai_usage_log DETACH PARTITION log_old")
        host.write(user, 500, into="log_old")
        assert known(user) == 127


def test_tables_that_inherit_from_the_log_count_as_its_partitions_do(empty_database: str) -> None:
    engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        build_host_metadata(HostMapping()).create_all(connection)
        connection.execute(text("CREATE TABLE child () INHERITS (ai_usage_log)"))
        install(connection, HostMapping(), with_host_tables=False)
    with PartitionedHost(engine) as host, connect() as connection:
        host.mapping = HostMapping()
        user = host.subscriber(10_000)
        host.write(user, 1)
        hold_tokens(connection, user, 0)
        host.write(user, 2)
        host.execute(
            "INSERT INTO child (id, user_id, section, total_tokens, created_at) "
            "VALUES (gen_random_uuid(), :user, 'chat', 40, :at)",
            user=user,
            at=NOVEMBER,
        )
        host.execute("UPDATE ai_usage_log SET total_tokens = total_tokens + 100")
        assert consumed(host, connection, user) == 343
        triggers = host.execute(CHILDS).all()
        host.set_up()
        assert len(triggers) == 4
        assert host.execute(CHILDS).all() == triggers  # creating them again would need the child's owner


def test_attachment_and_detachment_leave_the_host_unchanged(bare: PartitionedHost, empty_database: str) -> None:
    user = bare.subscriber(10_000)
    bare.write(user, 100)
    before = pg_dump(empty_database)
    attach(bare.mapping)
    assert len(bare.triggered()) == 1 + len(PARTS)
    with connect() as connection:
        plan = plan_detach(connection)
        tables = ("ai_usage_log", "billing_subscription", *PARTS)
        assert set(plan.host_tables) == {f"public.{table}" for table in tables}
    bare.execute("ALTER TABLE ai_usage_log DETACH PARTITION log_10")
    detach()
    assert bare.triggered() == []
    bare.execute(f"ALTER TABLE ai_usage_log ATTACH PARTITION log_10 {month(10)}")
    assert pg_dump(empty_database) == before


def test_the_migrate_role_needs_no_more_than_is_granted(bare: PartitionedHost) -> None:
    roles = RoleNames(migrate="part_mig", worker="part_worker", readonly="part_read")
    user = bare.subscriber(10_000)
    try:
        with bare.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as owner:
            for statement in grants_sql(owner, bare.mapping, roles):
                owner.exec_driver_sql(statement)
        with bare.engine.begin() as connection:
            connection.execute(text("SET LOCAL ROLE part_mig"))
            install(connection, bare.mapping, with_host_tables=False)
            # After a partition was detached, a repeated setup needs no right that only its owner has.
            connection.execute(text("RESET ROLE"))
            connection.execute(text('ALTER TABLE ai_usage_log DETACH PARTITION "Log 12"'))
            connection.execute(text("SET LOCAL ROLE part_mig"))
            install(connection, bare.mapping, with_host_tables=False)
        assert bare.triggered() == sorted(["ai_usage_log", *PARTS])
        with connect() as worker:
            hold_tokens(worker, user, 0)
        bare.write(user, 5, into="log_11")
        assert_true(bare, bare.mapping)
    finally:
        for role in ("part_mig", "part_worker", "part_read"):
            bare.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


@pytest.mark.parametrize(
    ("change", "log", "said"),
    [
        (FOREIGN, "spread", "public.far is a foreign table and a partition of spread"),
        (
            "SELECT",
            "log_11",
            "log_11 is a partition of .*ai_usage_log: rows written to .*ai_usage_log are not recorded",
        ),
    ],
)
def test_logs_with_rows_that_triggers_can_not_record_are_refused(
    bare: PartitionedHost, monkeypatch: pytest.MonkeyPatch, change: str, log: str, said: str
) -> None:
    bare.execute(change)
    bare.mapping = HostMapping(usage_log=UsageLogTable(table=log))
    with pytest.raises(NotInstalledError, match=said):
        bare.set_up()
    monkeypatch.setenv("TRUEUP_HOST__USAGE_LOG__TABLE", log)
    get_settings.cache_clear()
    with connect() as connection:
        [finding] = check_mapping(connection, get_settings())
    assert finding.level == "error"
    assert re.search(said, finding.what)
