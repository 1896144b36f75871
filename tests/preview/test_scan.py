"""The preview: by a role that may only read, in a database without trueup, and on a standby."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.pool import NullPool

from tests.discovery.test_proposal import UUID_HOST, UUID_MAPPING
from tests.host.test_mapped_hosts import LOG, MAPPINGS, USERS, do, lower, subscribe
from tests.support.host import START, Host, pooled_engine
from tests.support.legacy.loading import WITH_ROWS, load
from tests.support.legacy.population import make_population
from tests.support.mapped import NO_AGE
from tests.support.standby import caught_up, standby_of
from tests.support.waiting import wait_for
from trueup.errors import NotInstalledError, TrueupError
from trueup.host.fields import PaymentTable, SubscriptionTable, TokenUsageTable, UsageLogTable
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install
from trueup.preview import scan as scanning
from trueup.preview.report import PreviewReport
from trueup.preview.scan import ScanOutcome, scan
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import Finding
from trueup.reports.rows import DriftFilter, row_of_finding


class Seen(list[Finding]):
    """The findings of a scan, and the number of counters compared."""

    checked = 0
    outcome = ScanOutcome()

    def add(self, checked: int, findings: Sequence[Finding]) -> None:
        self.checked += checked
        self.extend(findings)

    def by_user(self) -> dict[Any, tuple[Any, ...]]:
        return {one.drift.user_id: shown(one) for one in self}


def shown(finding: Finding) -> tuple[Any, ...]:
    """A finding as a report shows it, without its time."""
    row = row_of_finding(finding)
    return (
        row.observed,
        row.expected,
        row.cause,
        row.certainty,
        row.tokens_explained,
        row.action,
        row.reason,
        row.evidence,
    )


LEFT_OUT = (
    "billing_payment and billing_tokenusage: not mapped. With decrement rows and payments more causes are named. "
    "`trueup db discover` proposes the settings."
)


def seen(engine: Engine, mapping: HostMapping | None = None, **options: Any) -> Seen:
    found = Seen()
    found.outcome = scan(engine, mapping or HostMapping(), found.add, **options)
    return found


@pytest.fixture
def bare(empty_database: str) -> Iterator[Host]:
    """A host whose database has nothing of trueup's."""
    engine = pooled_engine(empty_database)
    build_host_metadata(WITH_ROWS).create_all(engine)
    with Host(engine) as host:
        yield host
    engine.dispose()


@pytest.fixture
def drifting(bare: Host) -> list[int]:
    """Three users: a right counter, one with a missed decrement, and one charged for a failed request."""
    users = [bare.subscriber(1_000), bare.subscriber(1_000), bare.subscriber(1_000, counter=950)]
    bare.log(users[0], 100)
    bare.decrement(users[0], 100)
    bare.log(users[1], 300)
    bare.log(users[1], 7, at=START - timedelta(days=1))
    bare.log(users[2], 50, success=False)
    return users


@contextmanager
def as_role(bare: Host, *grants: str) -> Iterator[Engine]:
    """Return a function that makes an engine for a role with only these rights."""
    url = bare.engine.url
    role = f"reader_{url.database}"
    bare.execute(f"CREATE ROLE {role} LOGIN")
    try:
        for grant in grants:
            bare.execute(f"GRANT {grant} TO {role}")
        engine = create_engine(url.set(username=role), poolclass=NullPool)
        yield engine
        engine.dispose()
    finally:
        bare.execute(f"DROP OWNED BY {role}")
        bare.execute(f"DROP ROLE {role}")


READ = (
    "SELECT ON billing_subscription, billing_tokenplan, billing_fullplan, ai_usage_log"
    ", billing_tokenusage, billing_payment"
)


def test_drift_is_found_with_its_causes_by_a_role_that_may_only_read(bare: Host, drifting: list[int]) -> None:
    with as_role(bare, READ) as engine:
        found = seen(engine, rules=NO_AGE)
        assert found.checked == 3
        assert {user: row[:4] for user, row in found.by_user().items()} == {
            drifting[1]: (1_000, 700, "missed_decrement", "possible"),
            drifting[2]: (950, 1_000, "failed_usage_charged", "possible"),
        }
        assert found.outcome.notes == (LEFT_OUT,)
        # Rights on the columns that the scan reads are enough.
        names = seen(engine, WITH_ROWS, rules=NO_AGE)
        assert set(names.by_user()) == set(drifting[1:])


def test_nothing_is_written_and_nothing_is_left_behind(bare: Host, drifting: list[int]) -> None:
    before = contents(bare)
    statements: list[str] = []
    engine = create_engine(bare.engine.url, poolclass=NullPool)

    @event.listens_for(engine, "before_cursor_execute")
    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    # A transaction that writes takes an id. Those of other databases, such as autovacuum's, are not looked at.
    taken: list[Any] = []

    @event.listens_for(engine, "commit")
    @event.listens_for(engine, "rollback")
    def look(connection: Connection) -> None:
        driver: Any = connection.connection.dbapi_connection
        taken.append(driver.execute("SELECT pg_current_xact_id_if_assigned()").fetchone()[0])

    assert len(seen(engine)) == 2
    assert set(taken) == {None}
    assert contents(bare) == before
    engine.dispose()
    begun = [place for place, statement in enumerate(statements) if "SET TRANSACTION" in statement]
    assert all("REPEATABLE READ READ ONLY" in statements[place] for place in begun)
    assert len(begun) == 2  # one to prepare, one page
    assert bare.value("SELECT to_regnamespace('trueup') IS NULL")


def contents(host: Host) -> list[tuple[Any, ...]]:
    """Return every object of the database with its content, system columns included."""
    objects = host.execute(
        "SELECT relname, relkind, relfilenode, relowner, CAST(relacl AS text) FROM pg_class "
        "WHERE relnamespace = 'public'::regnamespace ORDER BY 1".replace("::", "\\:\\:")
    ).all()
    rows = [
        tuple(row)
        for table in objects
        if table.relkind == "r"
        for row in host.execute(
            f"SELECT t.ctid\\:\\:text, t.xmin\\:\\:text, t.* FROM {table.relname} t ORDER BY 1"
        ).all()
    ]
    return [*(tuple(one) for one in objects), *rows]


def test_a_read_only_connection_is_enough(bare: Host, drifting: list[int]) -> None:
    options = "-c default_transaction_read_only=on"
    engine = create_engine(bare.engine.url, connect_args={"options": options}, poolclass=NullPool)
    assert set(seen(engine).by_user()) == set(drifting[1:])
    engine.dispose()


def test_a_hot_standby_can_be_scanned(bare: Host, drifting: list[int]) -> None:
    with standby_of(bare.engine) as standby:
        bare.log(drifting[0], 5)
        wait_for(lambda: caught_up(bare.engine, standby), "the standby to have the newest row")
        with standby.connect() as connection:
            assert connection.scalar(text("SELECT pg_is_in_recovery()"))
        for mapping in (HostMapping(), WITH_ROWS):
            assert seen(standby, mapping, rules=NO_AGE).by_user() == seen(bare.engine, mapping, rules=NO_AGE).by_user()
        assert len(seen(standby)) == 3


@pytest.mark.parametrize("mapping", [WITH_ROWS, HostMapping()], ids=["decrements and payments", "neither"])
def test_a_preview_finds_the_same_as_a_dry_run_of_an_installed_trueup(
    empty_database: str, mapping: HostMapping
) -> None:
    people = make_population(160, seed=3, now=time.time())
    engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        install(connection, WITH_ROWS, with_host_tables=True)
    load(engine, people)
    with engine.begin() as connection:
        install(connection, mapping, with_host_tables=False)
        connection.execute(text("DELETE FROM trueup.journal_start"))  # a preview has no journal
    summary = reconcile(engine, mapping, dry_run=True)
    wanted = {one.drift.user_id: shown(one) for one in summary.findings}
    assert len(wanted) > 40
    attached = seen(engine, mapping, page_size=50)
    assert attached.by_user() == wanted
    assert attached.checked == summary.checked == 160
    granted = {person.user_id for person in people if person.life.grants}
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA trueup CASCADE"))
    bare = seen(engine, mapping, page_size=50).by_user()
    assert {user: row for user, row in bare.items() if user not in granted} == {
        user: row for user, row in wanted.items() if user not in granted
    }
    engine.dispose()


@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
def test_pages_of_any_size_find_the_same(bare: Host, drifting: list[int], page_size: int) -> None:
    found = seen(bare.engine, page_size=page_size)
    assert (found.checked, set(found.by_user())) == (3, set(drifting[1:]))


def test_a_single_user_can_be_scanned(bare: Host, drifting: list[int]) -> None:
    found = seen(bare.engine, only_user=drifting[2])
    assert (found.checked, set(found.by_user())) == (1, {drifting[2]})
    assert seen(bare.engine, only_user=999).checked == 0


def test_an_empty_host_has_no_drift(bare: Host) -> None:
    found = seen(bare.engine)
    assert (found.checked, list(found)) == (0, [])


def test_infinite_periods_and_null_counters_are_compared(bare: Host) -> None:
    bare.execute("ALTER TABLE billing_subscription ALTER start_date DROP NOT NULL")
    users = [bare.subscriber(1_000, counter=None), bare.subscriber(1_000), bare.subscriber(1_000, counter=-5)]
    bare.execute("UPDATE billing_subscription SET start_date = NULL WHERE user_id = :user", user=users[1])
    bare.log(users[1], 10, at=START - timedelta(days=9000))
    found = seen(bare.engine).by_user()
    assert {user: row[:3] for user, row in found.items()} == {
        users[0]: (None, 1_000, "counter_null"),
        users[1]: (1_000, 990, "missed_decrement"),
        users[2]: (-5, 1_000, "counter_negative"),
    }


@pytest.mark.parametrize("user_id_type", ["uuid", "text"])
def test_a_host_with_other_names_types_and_partitions_is_scanned_by_its_mapping(
    empty_database: str, user_id_type: str
) -> None:
    engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        # A log with integer ids can be scanned too.
        host = UUID_HOST.replace(
            "call_id uuid DEFAULT gen_random_uuid()", "call_id bigint GENERATED ALWAYS AS IDENTITY"
        )
        if user_id_type == "text":
            host = host.replace("app.customers (id uuid", "app.customers (id text").replace(
                "customer_id uuid", "customer_id text"
            )
        connection.exec_driver_sql(host)
        connection.exec_driver_sql(
            """
            INSERT INTO app.plans VALUES (1, 'p', 5000, 30, true);
            INSERT INTO app.customers (id) SELECT md5(n::text)::uuid FROM generate_series(1, 300) n;
            INSERT INTO app.memberships (id, customer_id, plan_id, started_at, tokens_left, enabled)
                SELECT gen_random_uuid(), id, 1, '2024-11-01', 5000, true FROM app.customers;
            INSERT INTO app.llm_calls (customer_id, tokens, succeeded, called_at)
                SELECT id, 40, true, '2024-11-02' FROM app.customers ORDER BY id LIMIT 200;
            """
        )
    mapping = HostMapping.model_validate({**UUID_MAPPING, "user_id_type": user_id_type})
    found = seen(engine, mapping, page_size=70)
    assert (found.checked, len(found), found.outcome.notes) == (300, 200, ())
    assert {row[:3] for row in found.by_user().values()} == {(5_000, 4_960, "missed_decrement")}
    engine.dispose()


@pytest.mark.parametrize("named", ["odd bigint, with decrements and payments", "odd uuid, text log ids", "odd text"])
def test_names_with_sql_syntax_are_only_names(empty_database: str, named: str) -> None:
    mapping = MAPPINGS[named]
    engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        connection.execute(text('CREATE SCHEMA "My App"'))
        build_host_metadata(mapping).create_all(connection)
    users = USERS[mapping.user_id_type]
    with Host(engine) as host:
        for number, user in enumerate(users, 1):
            subscribe(host, mapping, user, number)
            do(host, mapping, LOG, [user, 400 * number])
        lower(host, mapping, users[0], 400)
    found = seen(engine, mapping, rules=NO_AGE, page_size=1)
    assert found.checked == 2
    assert {user: row[:3] for user, row in found.by_user().items()} == {users[1]: (10_000, 9_200, "missed_decrement")}
    certain = mapping.token_usage.table is not None
    assert found.by_user()[users[1]][3] == ("inferred" if certain else "possible")
    engine.dispose()


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"usage_log": UsageLogTable(table="no.where")}, "host.usage_log.table: there is no table no.where"),
        ({"usage_log": UsageLogTable(total_tokens="x")}, "host.usage_log.total_tokens: ai_usage_log has no column x"),
        (
            {"usage_log": UsageLogTable(total_tokens="section")},
            "ai_usage_log.section is character varying, which is not",
        ),
        (
            {"subscription": SubscriptionTable(tokens_remaining="status")},
            "host.subscription.tokens_remaining: billing_su",
        ),
        ({"user_id_type": "uuid"}, "host.user_id_type is uuid, but billing_subscription.user_id is bigint"),
        ({"payment": PaymentTable(table="gone")}, "host.payment.table: there is no table gone"),
        ({"token_usage": TokenUsageTable(table="ai_usage_log")}, "ai_usage_log has no column subscription_id"),
    ],
    ids=str,
)
def test_a_wrong_mapping_is_refused_with_the_settings_name(bare: Host, mapping: Any, said: str) -> None:
    with pytest.raises(TrueupError, match="trueup db discover") as refused:
        seen(bare.engine, HostMapping(**mapping))
    assert said in str(refused.value)


def test_a_missing_right_is_named_with_its_remedy(bare: Host, drifting: list[int]) -> None:
    with as_role(bare, "SELECT ON billing_subscription, billing_tokenplan, billing_fullplan") as engine:
        with pytest.raises(TrueupError) as refused:
            seen(engine)
        said, role = str(refused.value), engine.url.username
    assert f'success, created_at): GRANT SELECT ON "public"."ai_usage_log" TO "{role}". Noth' in said
    assert said.count("GRANT") == 1


def test_row_security_never_hides_usage(bare: Host, drifting: list[int]) -> None:
    bare.execute("ALTER TABLE ai_usage_log ENABLE ROW LEVEL SECURITY")
    with as_role(bare, READ) as engine, pytest.raises(TrueupError, match="would hide rows of ai_usage_log"):
        seen(engine)
    assert len(seen(bare.engine)) == 2


def test_a_second_subscription_of_a_user_is_refused(bare: Host, drifting: list[int]) -> None:
    bare.execute("ALTER TABLE billing_subscription DROP CONSTRAINT billing_subscription_user_id_key")
    bare.execute("UPDATE billing_subscription SET user_id = :to WHERE user_id = :of", to=drifting[0], of=drifting[1])
    with pytest.raises(TrueupError, match=r"billing_subscription.user_id: of 3 subscriptions, 1 belong"):
        seen(bare.engine)


def test_a_log_without_an_index_is_read_once_and_drifts_have_no_causes(bare: Host, drifting: list[int]) -> None:
    bare.execute("DROP INDEX ai_usage_log_user_created")
    # A small log needs no index.
    assert seen(bare.engine).outcome.notes == (LEFT_OUT,)
    bare.execute(
        "INSERT INTO ai_usage_log (user_id, section, total_tokens, created_at) "
        "SELECT :user, repeat('x', 50), 0, :at FROM generate_series(1, 20000)",
        user=drifting[0],
        at=START,
    )
    null = bare.subscriber(5, counter=None)
    found = seen(bare.engine)
    assert 'CREATE INDEX CONCURRENTLY ON "public"."ai_usage_log" ("user_id", "created_at");' in found.outcome.notes[-1]
    assert found.checked == 4
    assert {user: row[:3] for user, row in found.by_user().items()} == {
        drifting[1]: (1_000, 700, "unexplained"),
        drifting[2]: (950, 1_000, "unexplained"),
        null: (None, 5, "counter_null"),
    }
    assert {row[5] for row in found.by_user().values()} == {"reported"}
    assert seen(bare.engine, only_user=drifting[1]).by_user()[drifting[1]][2] == "unexplained"


def test_grants_of_an_installed_trueup_count_or_the_scan_is_refused(host: Host) -> None:
    user = host.subscriber(1_000, counter=1_500)
    host.execute("INSERT INTO trueup.token_grant (user_id, tokens, reason) VALUES (:user, 500, 'r')", user=user)
    assert list(seen(host.engine)) == []
    rights = "SELECT ON ALL TABLES IN SCHEMA public"
    with pytest.raises(NotInstalledError, match="set up in this database for other table or column names"):
        seen(host.engine, HostMapping(usage_log_id_type="text"))
    with (
        as_role(host, rights) as engine,
        pytest.raises(NotInstalledError, match="the readonly role of `trueup db grants`"),
    ):
        seen(engine)
    with as_role(host, rights, "USAGE ON SCHEMA trueup", "SELECT ON ALL TABLES IN SCHEMA trueup") as engine:
        assert list(seen(engine)) == []


def test_a_page_that_takes_too_long_is_retried_as_a_smaller_one(
    bare: Host, drifting: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row with a slow function stands for a user with too many rows."""
    pages: list[int] = []
    once = scanning._Scan._page

    def page(self: Any, after: Any, only_user: Any, size: int) -> Any:
        pages.append(size)
        if size > 1:
            with self._reading(1) as connection:
                connection.execute(text("SET LOCAL statement_timeout = '1ms'"))
                connection.execute(text("SELECT pg_sleep(10)"))
        return once(self, after, only_user, size)

    monkeypatch.setattr(scanning._Scan, "_page", page)
    found = seen(bare.engine, page_size=10)
    assert (found.checked, set(found.by_user())) == (3, set(drifting[1:]))
    assert pages[:2] == [10, 1]


def test_the_report_adds_up_batches_and_keeps_the_largest_rows(bare: Host) -> None:
    users = [bare.subscriber(1_000_000, counter=1_000_000 + 10**size) for size in range(5)]
    users.append(bare.subscriber(1_000, counter=None))
    with closing(PreviewReport(DriftFilter())) as found:
        outcome = scan(bare.engine, HostMapping(), found.add, page_size=2)
        whole = found.report(outcome, max_rows=None)
        largest = found.report(outcome, max_rows=2)
    assert [row.user_id for row in whole.rows] == [users[4], users[3], users[5], users[2], users[1], users[0]]
    assert [row.user_id for row in largest.rows] == [users[4], users[3]]
    assert (whole.rows_left_out, largest.rows_left_out) == (0, 4)
    assert (whole.checked, whole.drifted, whole.tokens_overstated, whole.tokens_understated) == (6, 6, 11_111, 1_000)
    assert [(size.at_least, size.overstated, size.understated) for size in whole.sizes] == [
        (1, 1, 0), (10, 1, 0), (100, 1, 0), (1_000, 1, 1), (10_000, 1, 0)
    ]  # fmt: skip
    assert sum(cause.drifts for cause in whole.causes) == sum(whole.actions.values()) == 6
    assert (whole.kind, whole.status, whole.dry_run, whole.run_id) == ("look", "finished", True, None)
    assert whole.finished_at is not None
    assert whole.finished_at >= whole.started_at


@pytest.mark.parametrize(
    ("only", "left"),
    [
        (DriftFilter(min_tokens=1_000), 2),
        (DriftFilter(causes=("counter_null",)), 1),
        (DriftFilter(causes=("counter_null",), min_tokens=1_001), 0),
        (DriftFilter(causes=("counter_null", "manual_edit")), 0),
    ],
)
def test_the_report_shows_only_the_filtered_drifts(bare: Host, only: DriftFilter, left: int) -> None:
    bare.subscriber(1_000, counter=None)
    bare.subscriber(10_000, counter=11_000)
    bare.subscriber(1_000, counter=1_001)
    with closing(PreviewReport(only)) as found:
        report = found.report(scan(bare.engine, HostMapping(), found.add), max_rows=None)
    assert (report.checked, report.drifted, len(report.rows), report.filter) == (3, left, left, only)
