"""Logs whose ids are whole numbers, as Django makes them: identities and serials, drawn by the database."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

from tests.support.books import assert_true
from tests.support.host import START, Host, pooled_engine
from tests.support.sessions import run_at_once
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.database.engine import connect, dispose_engine, get_engine
from trueup.doctor.host import check_log_ids, check_mapping
from trueup.errors import NotInstalledError
from trueup.gate.owed_charges import list_owed_charges, settle_owed_charges
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install
from trueup.install.rights import RoleNames, grants_sql, lacking_rights, worker_rights
from trueup.reconcile.local_run import reconcile
from trueup.settings.policies import Rules
from trueup.settings.settings import get_settings
from trueup.usage.charges import find_answer
from trueup.usage.log import list_usage
from trueup.usage.tracker import TrackedUsage, track_ai_usage

MAPPING = HostMapping(usage_log_id_type="bigint")
SERIAL = (
    "ALTER TABLE ai_usage_log ALTER id DROP IDENTITY; ALTER TABLE ai_usage_log ALTER id TYPE integer; "
    'CREATE SEQUENCE "Log Ids" AS integer OWNED BY ai_usage_log.id; '
    "ALTER TABLE ai_usage_log ALTER id SET DEFAULT nextval('\"Log Ids\"')"
)
COLUMNS = {
    "identity": "SELECT",
    "identity, always": "ALTER TABLE ai_usage_log ALTER id SET GENERATED ALWAYS",
    "serial": SERIAL,
}


class NumberedHost(Host):
    """A host whose database generates the ids of its log."""

    def number(self, user: int, tokens: int, *, success: bool = True, at: datetime = START + timedelta(hours=1)) -> int:
        row: int = self.value(
            "INSERT INTO ai_usage_log (user_id, section, total_tokens, success, created_at) "
            "VALUES (:user, 'chat', :tokens, :success, :at) RETURNING id",
            user=user,
            tokens=tokens,
            success=success,
            at=at,
        )
        return row

    def ids(self) -> list[int]:
        return list(self.execute("SELECT id FROM ai_usage_log ORDER BY id").scalars())


@pytest.fixture
def bare(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[NumberedHost]:
    """Yield such a host before the setup of trueup."""
    monkeypatch.setenv("TRUEUP_HOST__USAGE_LOG_ID_TYPE", "bigint")
    get_settings.cache_clear()
    engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        build_host_metadata(MAPPING).create_all(connection)
    with NumberedHost(engine) as host:
        yield host
    engine.dispose()


def set_up(host: Host, mapping: HostMapping = MAPPING) -> None:
    with host.engine.begin() as connection:
        install(connection, mapping, with_host_tables=False)


@pytest.fixture(params=COLUMNS)
def numbered(request: pytest.FixtureRequest, bare: NumberedHost) -> NumberedHost:
    """Yield such a host with trueup, for each way of generating ids."""
    bare.execute(COLUMNS[request.param])
    set_up(bare)
    return bare


@pytest.fixture
def connection(bare: NumberedHost) -> Iterator[Connection]:
    with connect() as connection:
        yield connection


def track(user: int, *, key: str = "k", **more: Any) -> TrackedUsage:
    figures = {"section": "chat", "prompt_tokens": 30, "completion_tokens": 10, "model_name": "m"}
    return track_ai_usage(user, key=key, **{**figures, **more})


def test_a_charge_draws_its_id_as_the_hosts_rows_do_and_counts_once(
    numbered: NumberedHost, connection: Connection
) -> None:
    user = numbered.subscriber(10_000)
    first = numbered.number(user, 100)
    hold = hold_tokens(connection, user, 1_000, task="t")
    assert charge_tokens(connection, hold, 200, metadata={"task_id": "t"}, answer={"a": 1}).recorded
    assert numbered.value("SELECT count(*) FROM trueup.usage_delta") == 0
    assert balance(numbered, user) == (300, 800)
    last = numbered.number(user, 5)
    assert numbered.ids() == [first, first + 1, last]
    assert numbered.value("SELECT log_id FROM trueup.charge") == str(first + 1)
    assert {row.log_id: row.task_id for row in list_usage(connection, MAPPING, user)}[str(first + 1)] == "t"
    assert find_answer(connection, hold, "1") == {"a": 1}
    assert_true(numbered, MAPPING)


def test_a_repeated_call_is_found_by_its_charge_and_draws_no_id(numbered: NumberedHost, connection: Connection) -> None:
    user = numbered.subscriber(10_000)
    hold = hold_tokens(connection, user, 1_000, task="t")
    charge_tokens(connection, hold, 200)
    assert not charge_tokens(connection, hold, 200).recorded
    again = hold_tokens(connection, user, 1_000, task="t", retries=1)
    assert charge_tokens(connection, again, 70).recorded  # bought twice, by another attempt
    assert not charge_tokens(connection, again, 70).recorded
    row = numbered.number(user, 5)
    assert numbered.ids() == [row - 2, row - 1, row]
    assert_true(numbered, MAPPING)


def test_each_report_of_the_same_usage_returns_the_same_row(numbered: NumberedHost) -> None:
    user = numbered.subscriber(10_000)
    hosts = numbered.number(user, 1)
    reported = track(user)
    assert (reported.recorded, reported.log_id) == (True, str(hosts + 1))
    again, other = track(user), track(user, prompt_tokens=31)
    assert (again.recorded, again.differs, again.log_id) == (False, False, reported.log_id)
    assert (other.recorded, other.differs, other.log_id) == (False, True, reported.log_id)
    failed = track(user, success=False, error_message="refused")
    assert numbered.value("SELECT error_message FROM ai_usage_log WHERE id = :id", id=int(failed.log_id)) == "refused"
    assert numbered.ids() == [hosts, hosts + 1, hosts + 2]
    assert_true(numbered, MAPPING)


def test_concurrent_reports_of_the_same_usage_are_one_row(numbered: NumberedHost) -> None:
    user = numbered.subscriber(10_000)
    reports = run_at_once([lambda key=key: track(user, key=key) for key in "aaab"])  # type: ignore[misc]
    assert sorted(one.recorded for one in reports) == [False, False, True, True]
    assert sorted({int(one.log_id) for one in reports}) == numbered.ids()
    assert numbered.counter(user) == 10_000 - 80
    assert_true(numbered, MAPPING)


def test_a_reconcile_run_distinguishes_trueups_rows_from_the_hosts_by_their_ids(
    numbered: NumberedHost, connection: Connection
) -> None:
    user = numbered.subscriber(10_000)
    charge_tokens(connection, hold_tokens(connection, user, 1_000), 300)
    numbered.number(user, 40, at=datetime.now(UTC))
    run = reconcile(get_engine(), MAPPING, kind="deep", rules=Rules(min_age_seconds=0))
    assert (run.drifted, run.defects) == (1, 0)
    drift = numbered.execute("SELECT cause, written FROM trueup.drift").one()
    assert tuple(drift) == ("missed_decrement", 9_660)
    numbered.execute("DELETE FROM ai_usage_log WHERE total_tokens = 300")
    deep = reconcile(get_engine(), MAPPING, kind="deep", dry_run=True)
    assert [defect.kind for defect in deep.defect_rows] == ["charge_without_log_row"]


def test_a_row_whose_id_the_host_changes_counts_once_and_is_reported_with_its_first_id(
    numbered: NumberedHost, connection: Connection
) -> None:
    numbered.execute(
        "CREATE FUNCTION renumber() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN NEW.id := NEW.id + 1000; RETURN NEW; END $$; "
        "CREATE TRIGGER renumber BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION renumber()"
    )
    user = numbered.subscriber(10_000)
    charge_tokens(connection, hold_tokens(connection, user, 1_000, task="t"), 300)
    reported = track(user, error_message="odd")
    assert numbered.used(user) == 340
    assert numbered.ids() == [
        int(row) for row in numbered.execute("SELECT log_id FROM trueup.charge ORDER BY 1").scalars()
    ]
    assert numbered.value("SELECT error_message FROM ai_usage_log WHERE id = :id", id=int(reported.log_id)) == "odd"
    assert_true(numbered, MAPPING)


def test_a_charge_with_an_exhausted_sequence_is_owed_until_it_has_numbers_again(
    bare: NumberedHost, connection: Connection
) -> None:
    bare.execute(SERIAL)
    set_up(bare)
    user = bare.subscriber(10_000)
    hold = hold_tokens(connection, user, 1_000)
    bare.execute("SELECT setval('\"Log Ids\"', 2147483647)")
    assert charge_tokens(connection, hold, 10).owed
    assert "reached maximum value of sequence" in list_owed_charges(connection)[0].refusal
    assert bare.ids() == []
    bare.execute('ALTER SEQUENCE "Log Ids" AS bigint; ALTER TABLE ai_usage_log ALTER id TYPE bigint')
    assert settle_owed_charges(connection) == (1, 0)
    assert not charge_tokens(connection, hold, 10).recorded
    assert bare.ids() == [2**31]


def test_a_charge_without_a_sequence_is_owed_and_names_the_column(bare: NumberedHost, connection: Connection) -> None:
    set_up(bare)
    hold = hold_tokens(connection, bare.subscriber(10_000), 1_000)
    bare.execute("ALTER TABLE ai_usage_log ALTER id DROP IDENTITY")
    assert charge_tokens(connection, hold, 10).owed
    [charge] = list_owed_charges(connection)
    assert 'column "id" of "public"."ai_usage_log" no longer owns a sequence' in charge.refusal


@pytest.mark.parametrize(
    ("change", "mapped", "said"),
    [
        ("ALTER id DROP IDENTITY", "bigint", "ai_usage_log.id has no sequence"),
        ("ALTER id DROP IDENTITY, ALTER id SET DEFAULT 7", "bigint", "ai_usage_log.id has the default 7"),
        ("ALTER section SET DEFAULT ''", "uuid", 'is of type bigint.*Set usage_log_id_type = "bigint"'),
        ("ALTER section SET DEFAULT ''", "text", 'Set usage_log_id_type = "bigint"'),
        ("DROP id, ADD id uuid PRIMARY KEY", "bigint", 'Set usage_log_id_type = "uuid"'),
    ],
)
def test_ids_that_trueups_rows_can_not_get_are_refused_at_the_setup(
    bare: NumberedHost, monkeypatch: pytest.MonkeyPatch, connection: Connection, change: str, mapped: Any, said: str
) -> None:
    bare.execute(f"ALTER TABLE ai_usage_log {change}")
    with pytest.raises(NotInstalledError, match=said):
        set_up(bare, HostMapping(usage_log_id_type=mapped))
    monkeypatch.setenv("TRUEUP_HOST__USAGE_LOG_ID_TYPE", mapped)
    get_settings.cache_clear()
    [finding] = check_mapping(connection, get_settings())
    assert finding.level == "error"


def test_a_default_that_draws_from_a_sequence_of_another_owner_is_refused(bare: NumberedHost) -> None:
    bare.execute(SERIAL)
    bare.execute('ALTER SEQUENCE "Log Ids" OWNED BY NONE')
    with pytest.raises(NotInstalledError, match="ALTER SEQUENCE … OWNED BY"):
        set_up(bare)
    bare.execute('ALTER SEQUENCE "Log Ids" OWNED BY ai_usage_log.id')
    set_up(bare)
    bare.execute("CREATE SEQUENCE other; ALTER TABLE ai_usage_log ALTER id SET DEFAULT nextval('other')")
    with pytest.raises(NotInstalledError, match="which draws from no sequence of its own"):
        set_up(bare)


def test_a_sequence_near_its_end_or_behind_its_ids_is_found(bare: NumberedHost, connection: Connection) -> None:
    bare.execute(SERIAL)
    set_up(bare)
    settings = get_settings()
    assert [finding.level for finding in check_log_ids(connection, settings)] == ["ok"]
    user = bare.subscriber()
    bare.number(user, 1)
    assert [finding.level for finding in check_log_ids(connection, settings)] == ["ok"]
    bare.execute("UPDATE ai_usage_log SET id = 9")
    [behind] = check_log_ids(connection, settings)
    assert (behind.level, behind.detail) == ("error", {"sequence": 'public."Log Ids"', "last": 1, "highest_id": 9})
    bare.execute(str(behind.remedy).removeprefix("Run: "))
    bare.number(user, 1)
    assert [finding.level for finding in check_log_ids(connection, settings)] == ["ok"]
    bare.execute("SELECT setval('\"Log Ids\"', 1950000000)")
    [near] = check_log_ids(connection, settings)
    assert (near.level, near.detail["used"]) == ("warning", 0.908)
    # A sequence with a larger range than its column ends with the column.
    bare.execute('ALTER SEQUENCE "Log Ids" AS bigint')
    assert [finding.level for finding in check_log_ids(connection, settings)] == ["warning"]
    bare.execute("ALTER TABLE ai_usage_log ALTER id TYPE bigint")
    assert [finding.level for finding in check_log_ids(connection, settings)] == ["ok"]


def test_charges_from_before_a_change_of_the_logs_id_type_stay_known(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = host.subscriber(10_000)
    before = track(user)
    host.execute("ALTER TABLE ai_usage_log DROP id, ADD id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY")
    monkeypatch.setenv("TRUEUP_HOST__USAGE_LOG_ID_TYPE", "bigint")
    get_settings.cache_clear()
    set_up(host)
    again = track(user, prompt_tokens=7)
    assert (again.recorded, again.differs, again.log_id) == (False, False, before.log_id)
    assert reconcile(get_engine(), MAPPING, kind="deep").defects == 0
    new = track(user, key="new")
    assert new.log_id == host.value("SELECT max(id)::text FROM ai_usage_log") != before.log_id
    assert_true(host, MAPPING)


def test_ids_without_a_sequence_give_no_finding(host: Host) -> None:
    with connect() as connection:
        [finding] = check_log_ids(connection, get_settings())
    assert finding.level == "ok"


@pytest.fixture
def roles(bare: NumberedHost) -> Iterator[RoleNames]:
    suffix = uuid.uuid4().hex[:8]
    names = RoleNames(migrate=f"mig_{suffix}", worker=f"worker_{suffix}", readonly=f"read_{suffix}")
    yield names
    dispose_engine()
    for role in (names.migrate, names.worker, names.readonly):
        bare.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_the_worker_role_draws_ids_with_a_right_on_the_sequence_only(
    bare: NumberedHost, roles: RoleNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.execute(SERIAL)
    user = bare.subscriber(10_000)
    set_up(bare)
    with bare.engine.begin() as owner:
        for statement in grants_sql(owner, MAPPING, roles):
            owner.exec_driver_sql(statement)
    url = make_url(str(bare.engine.url)).set(username=roles.worker)
    monkeypatch.setenv("TRUEUP_DATABASE_URL", url.render_as_string(hide_password=False))
    dispose_engine()
    get_settings.cache_clear()
    assert track(user).recorded
    with connect() as worker:
        charge_tokens(worker, hold_tokens(worker, user, 1_000), 10)
        assert lacking_rights(worker, worker_rights(worker, MAPPING)) == []
        bare.execute(f'REVOKE USAGE ON SEQUENCE "Log Ids" FROM {roles.worker}')
        assert [str(right) for right in lacking_rights(worker, worker_rights(worker, MAPPING))] == [
            'USAGE ON SEQUENCE public."Log Ids"'
        ]
    with bare.engine.connect() as readonly:
        readonly.execute(text(f"SET ROLE {roles.readonly}"))
        assert not readonly.scalar(text("SELECT has_sequence_privilege('\"Log Ids\"', 'USAGE')"))
