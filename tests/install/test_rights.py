"""Least-privilege roles: each role can do its part, and nothing else."""

import uuid
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup, trueup_json
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.database.engine import connect, dispose_engine, get_engine, transaction
from trueup.database.retry import retrying
from trueup.doctor.database import examine_database
from trueup.errors import InvalidInputError, MissingRightError, NotInstalledError
from trueup.gate.holds import close_hold, expire_holds
from trueup.gate.provider_calls import begin_call, end_call, extend_hold
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.install.detach import detach
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install
from trueup.install.rights import (
    RoleNames,
    deletable_tables,
    grants_sql,
    lacking_rights,
    readonly_rights,
    worker_rights,
)
from trueup.monitoring.alerts import claim_due, raise_test
from trueup.reconcile.distributed_run import plan_run, sweep, work_on_shard
from trueup.settings.policies import Rules
from trueup.settings.settings import get_settings
from trueup.usage.charges import prune_answers
from trueup.usage.outbox import begin_effect, finish_effect
from trueup.usage.tracker import track_ai_usage


@dataclass
class Site:
    """A database set up by least-privilege roles, with a host whose own role has no right in trueup's schema."""

    url: str
    roles: RoleNames
    owner: Engine
    host: Host
    monkeypatch: pytest.MonkeyPatch

    def grant(self) -> None:
        """Run what `trueup db grants` prints, as the database's owner."""
        with self.owner.begin() as connection:
            for statement in grants_sql(connection, get_settings().host, self.roles):
                connection.exec_driver_sql(statement)

    def become(self, role: str) -> None:
        """Let this process's settings connect as that role."""
        url = make_url(self.url).set(username=role).render_as_string(hide_password=False)
        self.monkeypatch.setenv("TRUEUP_DATABASE_URL", url)
        dispose_engine()
        get_settings.cache_clear()

    def set_up(self) -> None:
        self.become(self.roles.migrate)
        with transaction() as connection:
            install(connection, get_settings().host, with_host_tables=False)

    def refuses(self, role: str, statement: str) -> bool:
        """Return whether PostgreSQL refuses this statement to the role."""
        engine = create_engine(make_url(self.url).set(username=role), poolclass=NullPool)
        with engine.connect() as connection, pytest.raises(ProgrammingError) as caught:
            connection.exec_driver_sql(statement)
        return isinstance(caught.value.orig, InsufficientPrivilege)


@pytest.fixture
def site(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A host's database with its own roles and without trueup."""
    monkeypatch.setenv("TRUEUP_HOST__PAYMENT__TABLE", "billing_payment")
    monkeypatch.setenv("TRUEUP_HOST__TOKEN_USAGE__TABLE", "billing_tokenusage")
    get_settings.cache_clear()
    suffix = uuid.uuid4().hex[:8]  # all databases of a server share its roles
    names = RoleNames(migrate=f"mig {suffix}", worker=f'wor"ker {suffix}', readonly=f"Read'er {suffix}")
    app = f"app_{suffix}"
    owner = create_engine(empty_database, poolclass=NullPool)
    with owner.begin() as connection:
        build_host_metadata(get_settings().host).create_all(connection)
        connection.execute(text("ALTER TABLE accounts_user ADD password text DEFAULT 'secret'"))
        connection.execute(text(f"CREATE ROLE {app} LOGIN"))
        connection.execute(text(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {app}"))
    engine = create_engine(make_url(empty_database).set(username=app), poolclass=NullPool)
    with Host(engine) as host:
        yield Site(url=empty_database, roles=names, owner=owner, host=host, monkeypatch=monkeypatch)
    dispose_engine()
    with owner.begin() as connection:
        for role in (*astuple(names), app):
            if connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}):
                quoted = connection.dialect.identifier_preparer.quote_identifier(role)
                connection.exec_driver_sql(f"DROP OWNED BY {quoted} CASCADE; DROP ROLE {quoted}")


@pytest.fixture
def ready(site: Site) -> Site:
    """The same database, set up by the migrate role."""
    site.grant()
    site.set_up()
    site.grant()
    return site


def test_the_worker_holds_calls_charges_and_grants(ready: Site) -> None:
    user = ready.host.subscriber(10_000)
    ready.become(ready.roles.worker)
    with connect() as connection:
        hold = hold_tokens(connection, user, 1_000)
        assert begin_call(connection, hold, call_key="1", max_tokens=500, lease_seconds=9, ttl_seconds=9) is None
        charge_tokens(connection, hold, 300)
        assert extend_hold(connection, hold, tokens=200) == (None, 900)
        begin_call(connection, hold, call_key="2", max_tokens=500, lease_seconds=9, ttl_seconds=9)
        end_call(connection, hold, call_key="2", unknown=False)
        effect = begin_effect(connection, user_id=user, task_id=hold.task_id, effect="dm", detail={})
        finish_effect(connection, effect, "sent")
        close_hold(connection, hold, completed=True)
        expire_holds(connection)
        prune_answers(connection, older_than=timedelta(0), limit=10)
        raise_test(connection)
        claim_due(connection)
        assert lacking_rights(connection, worker_rights(connection, get_settings().host)) == []
    figures = {"prompt_tokens": 5, "completion_tokens": 5, "model_name": "m", "response_time_ms": 1}
    track_ai_usage(user, section="chat", key="a", **figures)
    track_ai_usage(user, section="chat", key="b", success=False, error_message="refused", **figures)
    trueup("tokens", "grant", user, 100, "--reason", "gift", "--reference", "r1")
    trueup("tokens", "revoke", user, trueup_json("tokens", "grants", user)["grants"][0]["id"], "--reason", "wrong")
    assert ready.host.value("SELECT count(*) FROM ai_usage_log WHERE error_message = 'refused'") == 1
    assert ready.host.counter(user) == 9_690


def test_the_worker_reconciles_and_people_decide_through_it(ready: Site) -> None:
    host = ready.host
    missed, shown, shared = host.subscriber(1_000), host.subscriber(1_000, counter=1_500), host.subscriber(1_000)
    host.plan(500)
    host.log(missed, 300)
    ready.become(ready.roles.worker)
    trueup("reconcile", "--dry-run")
    trueup("reconcile", "--jobs", 2)
    trueup("reconcile", "--deep")
    assert host.counter(missed) == 700
    [item] = trueup_json("drift", "review")["drifts"]
    assert item["user_id"] == shown
    trueup("drift", "accept", item["id"], "--note", "refunded")
    assert host.counter(shown) == 1_000
    host.log(shared, 10, at=datetime.now(UTC))
    engine, rules = get_engine(), Rules(min_age_seconds=0)
    run = plan_run(engine, kind="deep", rules=rules, shard_size=1_000, requested_by="test")
    assert run is not None
    work = {"rules": rules, "batch_size": 10, "seconds": 60.0}
    work_on_shard(engine, get_settings().host, run_id=run.run_id, number=run.shards[0], **work)
    sweep(engine, rules)
    assert host.counter(shared) == 990
    for command in (("drift", "report"), ("drift", "history"), ("drift", "explain", missed), ("status",)):
        trueup(*command)


FORBIDDEN = [
    "CREATE TABLE trueup.mine (id int)",
    "CREATE FUNCTION trueup.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE SCHEMA mine",
    "ALTER TABLE trueup.balance ADD mine int",
    "DROP FUNCTION trueup.log_epoch()",
    "DROP TABLE trueup.charge",
    "TRUNCATE trueup.usage_delta",
    "TRUNCATE ai_usage_log",
    "DROP TRIGGER trueup_inserted ON ai_usage_log",
    "ALTER TABLE ai_usage_log DISABLE TRIGGER trueup_inserted",
    "CREATE TRIGGER t AFTER DELETE ON ai_usage_log FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_truncated()",
    "DELETE FROM trueup.charge",
    "DELETE FROM trueup.drift_decision",
    "UPDATE trueup.installation SET mapping_fingerprint = ''",
    "DELETE FROM trueup.log_truncation",
    "DELETE FROM ai_usage_log",
    "UPDATE ai_usage_log SET total_tokens = 0",
    "UPDATE billing_subscription SET start_date = now()",
    "DELETE FROM billing_subscription",
    "UPDATE billing_tokenplan SET tokens_included = 9",
    "SELECT password FROM accounts_user",
]


def test_the_worker_changes_no_structure_and_only_the_rows_that_it_must(ready: Site) -> None:
    assert [statement for statement in FORBIDDEN if not ready.refuses(ready.roles.worker, statement)] == []


def test_the_worker_counts_rows_that_come_with_a_table_that_inherits_from_the_log(ready: Site) -> None:
    user = ready.host.subscriber(1_000)
    ready.become(ready.roles.worker)
    retrying(lambda connection: hold_tokens(connection, user, 0))
    with Host(ready.owner) as owner:
        owner.execute("CREATE TABLE child (LIKE ai_usage_log INCLUDING ALL)")
        owner.execute("INSERT INTO child (user_id, section, total_tokens) VALUES (:user, 'chat', 40)", user=user)
        owner.execute("ALTER TABLE child INHERIT ai_usage_log")
        ready.become(ready.roles.readonly)
        with pytest.raises(MissingRightError, match=r"permission denied for table installation.*`trueup db grants`"):
            retrying(lambda connection: read_account(connection, user))
        ready.become(ready.roles.worker)
        assert retrying(lambda connection: read_account(connection, user)).consumed == 40
        owner.execute("DROP TABLE child")


def test_a_host_that_has_no_right_in_trueup_writes_its_log_and_each_row_counts(ready: Site) -> None:
    host = ready.host
    user = host.subscriber(1_000)
    ready.become(ready.roles.worker)
    with connect() as connection:
        hold_tokens(connection, user, 0)
    row = host.log(user, 100)
    host.execute("UPDATE ai_usage_log SET total_tokens = 70 WHERE id = :row", row=row)
    host.log(user, 5)
    host.execute("DELETE FROM ai_usage_log WHERE total_tokens = 5")
    with Host(ready.owner) as superuser:
        assert superuser.value("SELECT sum(tokens) FROM trueup.usage_delta WHERE user_id = :user", user=user) == 70
        assert_true(superuser, get_settings().host)
    app = str(host.engine.url.username)
    assert ready.refuses(app, "SELECT * FROM trueup.usage_delta")
    assert ready.refuses(app, "SELECT trueup.log_epoch()")


def test_readonly_shows_every_report_and_writes_nothing(ready: Site) -> None:
    host = ready.host
    user = host.subscriber(1_000)
    host.log(user, 300)
    ready.become(ready.roles.worker)
    trueup("reconcile")
    ready.become(ready.roles.readonly)
    commands = [("drift", "report"), ("drift", "history"), ("drift", "review"), ("drift", "explain", user), ("status",)]
    commands += [
        ("holds", "list", "--all"),
        ("usage", "list", user),
        ("tokens", "show", user),
        ("tokens", "grants", user),
    ]
    for command in commands:
        trueup(*command)
    assert "refused" in trueup("tokens", "grant", user, 1, "--reason", "x", "--reference", "r", code=1).stderr
    for statement in (
        "UPDATE trueup.balance SET held = 0",
        "INSERT INTO ai_usage_log (user_id, section) VALUES (1, 'chat')",
        "UPDATE billing_subscription SET tokens_remaining = 1",
        "CREATE TABLE trueup.mine (id int)",
        "SELECT email FROM accounts_user",
    ):
        assert ready.refuses(ready.roles.readonly, statement)


@pytest.mark.parametrize("role", ["worker", "readonly"])
def test_no_other_role_may_call_trigger_functions_which_write_with_their_owners_rights(ready: Site, role: str) -> None:
    assert ready.refuses(
        getattr(ready.roles, role),
        "CREATE TEMP TABLE forged (id uuid, user_id bigint, created_at timestamptz, total_tokens int, success bool); "
        "CREATE TRIGGER t AFTER INSERT ON forged REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT "
        "EXECUTE FUNCTION trueup.append_inserted()",
    )


def test_the_migrate_role_may_repeat_install_while_workers_run(ready: Site) -> None:
    ready.set_up()
    user = ready.host.subscriber(1_000)
    ready.become(ready.roles.worker)
    with connect() as connection:
        assert hold_tokens(connection, user, 400).tokens_left == 400
        assert lacking_rights(connection, worker_rights(connection, get_settings().host)) == []


def test_objects_that_a_superuser_created_are_handed_over(site: Site) -> None:
    with site.owner.begin() as connection:
        install(connection, get_settings().host, with_host_tables=False)
    site.grant()
    site.set_up()
    site.become(site.roles.readonly)
    with connect() as connection:
        mapping = get_settings().host
        assert lacking_rights(connection, readonly_rights(connection, mapping)) == []
        lacking = lacking_rights(connection, worker_rights(connection, mapping))
        assert "INSERT ON TABLE trueup.hold" in map(str, lacking)
        assert 'UPDATE ("tokens_remaining") ON TABLE public.billing_subscription' in map(str, lacking)


def test_the_role_that_installed_trueup_may_detach_it(ready: Site, tmp_path: Path) -> None:
    ready.become(ready.roles.migrate)
    assert detach(history=tmp_path / "history")["installation"] == 1
    assert ready.host.value("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'trueup%'") == 0
    assert ready.host.value("SELECT to_regnamespace('trueup') IS NULL")


def test_doctor_names_the_rights_that_a_role_lacks_and_runs_every_other_check(ready: Site) -> None:
    ready.become(str(ready.host.engine.url.username))
    findings = examine_database(get_settings())
    levels = {(finding.check, finding.level) for finding in findings}
    assert {
        ("postgres", "ok"),
        ("mapping", "ok"),
        ("schema", "error"),
        ("triggers", "ok"),
        ("books", "error"),
    } <= levels
    [rights] = [finding for finding in findings if finding.check == "rights"]
    assert {"USAGE ON SCHEMA trueup", "SELECT ON TABLE trueup.hold"} <= set(rights.detail["lacking"])
    assert "trueup db grants --worker-role" in str(rights.remedy)
    ready.become(ready.roles.worker)
    assert [finding for finding in examine_database(get_settings()) if finding.level == "error"] == []


def test_only_tables_of_temporary_rows_allow_deletes() -> None:
    deletable = deletable_tables()
    assert {"usage_delta", "call_intent"} <= deletable
    assert not deletable & {"charge", "hold", "balance", "drift", "drift_decision", "token_grant", "reconcile_run"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"worker": "x" * 64}, "worker role: 'x+' is no role: give 1 to 63 bytes"),
        ({"readonly": ""}, "readonly role: '' is no role"),
        ({"migrate": "a$$b"}, r"migrate role: .* without \$\$"),
        ({"migrate": "trueup_worker"}, "Give three different names"),
    ],
)
def test_an_invalid_role_name_is_refused(site: Site, change: dict[str, str], told: str) -> None:
    with site.owner.connect() as connection, pytest.raises(InvalidInputError, match=told):
        grants_sql(connection, HostMapping(), replace(RoleNames(), **change))


def test_a_missing_table_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_HOST__USAGE_LOG__TABLE", "app.log")
    get_settings.cache_clear()
    with site.owner.connect() as connection, pytest.raises(NotInstalledError, match=r"no table app\.log"):
        grants_sql(connection, get_settings().host, site.roles)


def test_psql_can_run_the_printed_grants(ready: Site) -> None:
    ready.become("postgres")
    printed = trueup("db", "grants", "--worker-role", ready.roles.worker).stdout
    assert printed.startswith("-- Least-privilege roles for trueup in ")
    assert "\nBEGIN;\n" in printed
    assert printed.endswith("COMMIT;\n")
    with ready.owner.connect() as connection:
        connection.exec_driver_sql(printed.replace("COMMIT;", "ROLLBACK;").replace("%", "%%"))


def test_rows_that_a_policy_hides_are_never_left_out_of_a_sum(ready: Site) -> None:
    user = ready.host.subscriber(10_000)
    ready.host.log(user, 9_000)
    with ready.owner.begin() as connection:
        connection.execute(text("ALTER TABLE ai_usage_log ENABLE ROW LEVEL SECURITY"))
    for role in (ready.roles.worker, ready.roles.migrate):
        ready.become(role)
        with pytest.raises(MissingRightError, match=r"hides rows.*ai_usage_log.*BYPASSRLS"):
            retrying(lambda connection: hold_tokens(connection, user, 5_000))
        [finding] = [each for each in examine_database(get_settings()) if each.check == "mapping"]
        assert (finding.level, finding.detail["tables"]) == ("error", ["ai_usage_log"])
    with pytest.raises(MissingRightError, match="hides rows"):
        attach(get_settings().host)
    with ready.owner.begin() as connection:
        for role in (ready.roles.worker, ready.roles.migrate):
            quoted = connection.dialect.identifier_preparer.quote_identifier(role)
            connection.exec_driver_sql(f"ALTER ROLE {quoted} BYPASSRLS")
    attach(get_settings().host)
    ready.become(ready.roles.worker)
    with connect() as connection:
        charge_tokens(connection, hold_tokens(connection, user, 1_000), 500)
    assert ready.host.value("SELECT tokens_remaining FROM billing_subscription") == 9_500
