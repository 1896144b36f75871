"""Hosts with other designs: all steps from the preview to the detachment, with the mapping only.

Two of them are those of docs/mapping.md, as it shows them.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text

from tests.support.books import assert_true
from tests.support.dumps import pg_dump, without_positions
from tests.support.host import START, Host, pooled_engine
from tests.support.mapped import NO_AGE
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.accounts.grants import grant_tokens
from trueup.accounts.summary import read_summary
from trueup.database.engine import connect, dispose_engine, get_engine, transaction
from trueup.doctor.database import examine_database
from trueup.errors import TokensDenied
from trueup.gate.holds import close_hold
from trueup.host.mapping import HostMapping
from trueup.install.attach import attach
from trueup.install.detach import detach
from trueup.install.install import install
from trueup.install.rights import RoleNames, grants_sql, worker_rights
from trueup.preview.scan import scan
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import Finding
from trueup.reconcile.shards import find_suspects
from trueup.reports.run_report import find_source, read_report, read_source, with_host_faults
from trueup.settings.settings import CONFIG_VARIABLE, get_settings
from trueup.usage.log import list_usage
from trueup.usage.tracker import track_ai_usage

MANUAL = Path(__file__).parents[2] / "docs" / "mapping.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", MANUAL.read_text(), re.DOTALL)
HOSTS = [block for kind, block in BLOCKS if kind == "sql"]
EXAMPLES = [block for kind, block in BLOCKS if kind == "toml"]
SETTINGS = [block for block in EXAMPLES if block.count("[host.") > 1]

# Tokens by an expression, and rows that count by one.
EXPRESSION_HOST = """
    CREATE TABLE plan_of (id bigint PRIMARY KEY, owner bigint NOT NULL UNIQUE, "Base" integer NOT NULL,
        bonus integer, left_over integer NOT NULL, since timestamptz NOT NULL, until timestamptz);
    CREATE TABLE calls (id uuid PRIMARY KEY, owner bigint NOT NULL, kind text NOT NULL, tokens integer NOT NULL,
        ok boolean NOT NULL, is_test boolean NOT NULL DEFAULT false, said text, extra jsonb,
        at timestamptz NOT NULL);
    CREATE INDEX ON calls (owner, at);
"""
EXPRESSION_SETTINGS = """
    [host]
    user = false
    token_plan = false
    full_plan = false
    [host.subscription]
    table = "plan_of"
    user_id = "owner"
    start_date = "since"
    end_date = "until"
    tokens_remaining = "left_over"
    is_active = {value = true}
    tokens_included = {expression = "{row}.\\"Base\\" + coalesce({row}.bonus, 0)"}
    [host.usage_log]
    table = "calls"
    user_id = "owner"
    section = "kind"
    prompt_tokens = {value = 0}
    completion_tokens = {value = 0}
    total_tokens = "tokens"
    response_time_ms = {value = 0}
    success = "ok"
    counts = {expression = "{row}.ok AND NOT {row}.is_test AND {row}.kind IN ('chat', 'other')"}
    model_name = {value = ""}
    error_message = "said"
    metadata = "extra"
    created_at = "at"
"""


@dataclass(kw_only=True)
class Site:
    """A host with its own SQL for the operations of hosts. Users are numbered from 1."""

    host: Host
    sign_up: str
    log: str
    lower: str
    counter: str
    users: tuple[Any, Any]
    more: str

    @property
    def mapping(self) -> HostMapping:
        return get_settings().host

    def do(self, statement: str, user: Any, tokens: int = 0, **values: Any) -> None:
        given = {"user": user, "tokens": tokens, "start": START, "at": START + timedelta(hours=1), **values}
        self.host.execute(statement, **{name: value for name, value in given.items() if f":{name}" in statement})

    def logs(self, user: Any, tokens: int, *, ok: bool = True) -> None:
        self.do(self.log, user, tokens, ok=ok)

    def left(self, user: Any) -> int:
        left: int = self.host.value(self.counter, user=user)
        return left


STATEMENTS: dict[str, dict[str, Any]] = {
    "of its own names": {
        "users": (UUID(int=7), UUID(int=2**90)),
        "sign_up": "WITH u AS (INSERT INTO \"Acme AI\".\"Customers\" VALUES (:user, 'Ann', 'ann@example.com')), "
        'p AS (INSERT INTO "Acme AI"."Plans" ("Title", "Tokens", "Days") VALUES (\'Pro\', :tokens, 30) RETURNING *) '
        'INSERT INTO "Acme AI"."Memberships" ("CustomerId", "PlanId", "Since", "TokensLeft") '
        'SELECT :user, "Id", :start, "Tokens" FROM p',
        "log": 'INSERT INTO "Acme AI"."LlmCalls" ("CustomerId", "Feature", "Tokens", "Ok", "At") '
        "VALUES (:user, 'chat', :tokens, :ok, :at)",
        "lower": 'UPDATE "Acme AI"."Memberships" SET "TokensLeft" = "TokensLeft" - :tokens WHERE "CustomerId" = :user',
        "counter": 'SELECT "TokensLeft" FROM "Acme AI"."Memberships" WHERE "CustomerId" = :user',
        "more": 'UPDATE "Acme AI"."Plans" SET "Tokens" = "Tokens" + :tokens WHERE "Id" = '
        '(SELECT "PlanId" FROM "Acme AI"."Memberships" WHERE "CustomerId" = :user)',
    },
    "of little": {
        "users": ("it's ann", "bob %s :b"),
        "sign_up": "INSERT INTO account VALUES (:user, :tokens, :tokens, :start)",
        "log": "INSERT INTO llm_call (account, tokens, ended, at) VALUES (:user, :tokens, "
        "CAST(CASE WHEN :ok THEN 'from cache' ELSE 'failed' END AS outcome), :at)",
        "lower": "UPDATE account SET tokens_left = tokens_left - :tokens WHERE name = :user",
        "counter": "SELECT tokens_left FROM account WHERE name = :user",
        "more": "UPDATE account SET quota = quota + :tokens WHERE name = :user",
    },
    "of expressions": {
        "users": (1, 2**50),
        "sign_up": "INSERT INTO plan_of VALUES (:user, :user, :tokens - 1, 1, :tokens, :start)",
        "log": "INSERT INTO calls (id, owner, kind, tokens, ok, is_test, at) VALUES (gen_random_uuid(), :user, 'chat', "
        ":tokens, true, NOT :ok, :at)",
        "lower": "UPDATE plan_of SET left_over = left_over - :tokens WHERE owner = :user",
        "counter": "SELECT left_over FROM plan_of WHERE owner = :user",
        "more": "UPDATE plan_of SET bonus = bonus + :tokens WHERE owner = :user",
    },
}
TABLES = dict(
    zip(STATEMENTS, [*zip(HOSTS, SETTINGS, strict=True), (EXPRESSION_HOST, EXPRESSION_SETTINGS)], strict=True)
)


@pytest.fixture(params=STATEMENTS)
def site(
    request: pytest.FixtureRequest, empty_database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Site]:
    tables, settings = TABLES[request.param]
    (tmp_path / "trueup.toml").write_text(settings)
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "trueup.toml"))
    get_settings.cache_clear()
    engine: Engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        connection.execute(text(tables))
    with Host(engine) as host:
        yield Site(host=host, **STATEMENTS[request.param])
    engine.dispose()


@pytest.fixture
def subscribed(site: Site) -> Site:
    for user in site.users:
        site.do(site.sign_up, user, 10_000)
    return site


@pytest.fixture
def attached(subscribed: Site) -> Site:
    attach(subscribed.mapping)
    return subscribed


def test_preview_attachment_and_detachment_leave_the_host_unchanged(subscribed: Site) -> None:
    site, (ann, bob) = subscribed, subscribed.users
    site.logs(ann, 1_000)
    site.logs(ann, 50, ok=False)
    site.logs(bob, 70)
    site.do(site.lower, bob, 70)
    found = []
    scan(site.host.engine, site.mapping, lambda checked, findings: found.extend(findings), rules=NO_AGE)
    assert [(one.drift.user_id, one.drift.observed, one.drift.expected) for one in found] == [(ann, 10_000, 9_000)]
    assert [part.cause for part in found[0].explanation.components] == ["missed_decrement"]
    url = site.host.engine.url.render_as_string(hide_password=False)
    before = without_positions(pg_dump(url))
    assert attach(site.mapping) == {"balances": 2}
    assert_true(site.host, site.mapping)
    assert attach(site.mapping) == {"balances": 0}
    detach()
    assert without_positions(pg_dump(url)) == before


def test_the_gate_charges_and_the_tracker_keep_the_books(attached: Site) -> None:
    site, (ann, bob) = attached, attached.users
    site.logs(ann, 1_000)
    site.do(site.lower, ann, 1_000)
    with connect() as connection:
        with pytest.raises(TokensDenied):
            hold_tokens(connection, ann, 9_001)
        hold = hold_tokens(connection, ann, 5_000, task="t")
        charge_tokens(connection, hold, 200, metadata={"task_id": "t"})
        assert not charge_tokens(connection, hold, 200, metadata={"task_id": "t"}).recorded
        assert close_hold(connection, hold) == "settled"
        rows = {row.total_tokens: row for row in list_usage(connection, site.mapping, ann)}
    assert (rows[200].task_id, rows[200].success) == ("t", True)
    assert (rows[1_000].task_id, rows[1_000].success) == (None, True)
    figures = {"section": "other", "prompt_tokens": 20, "completion_tokens": 10, "model_name": "m"}
    assert track_ai_usage(ann, **figures, key="1").recorded
    again = track_ai_usage(ann, **figures, key="1")
    assert (again.recorded, again.differs) == (False, False)
    assert track_ai_usage(ann, **figures | {"completion_tokens": 11}, key="1").differs
    failed = {**figures, "section": "chat", "prompt_tokens": 70}
    assert track_ai_usage(ann, **failed, key="2", success=False, error_message="no answer").recorded
    assert not track_ai_usage(ann, **failed, key="2", success=False, error_message="no answer").recorded
    with connect() as connection:
        account = read_account(connection, ann)
        assert [row.success for row in list_usage(connection, site.mapping, ann) if row.total_tokens == 80] == [False]
        assert (account.original, account.consumed, account.held) == (10_000, 1_230, 0)
        assert read_account(connection, bob).consumed == 0
    assert site.left(ann) == 8_770
    assert_true(site.host, site.mapping)


def test_drift_is_explained_corrected_and_audited(attached: Site) -> None:
    site, (ann, bob) = attached, attached.users
    site.logs(ann, 300)
    site.logs(bob, 40)
    site.do(site.lower, bob, 40)
    reconcile(get_engine(), site.mapping, rules=NO_AGE)
    with connect() as connection:
        report = read_report(connection, site.mapping.user_id_type)
    assert report is not None
    assert [(row.user_id, row.cause, row.written) for row in report.rows] == [(ann, "missed_decrement", 9_700)]
    with transaction() as connection:
        source = find_source(connection, site.mapping.user_id_type)
        assert source is not None
        report = with_host_faults(connection, site.mapping, source, read_source(connection, source), min_age_seconds=0)
        assert report.systemic == []
    site.logs(bob, 5, ok=False)
    again = reconcile(get_engine(), site.mapping, rules=NO_AGE, kind="deep")
    assert (again.checked, again.drifted, again.defects) == (2, 0, 0)
    assert (site.left(ann), site.left(bob)) == (9_700, 9_960)
    with connect() as connection:  # otherwise each pass would check all users in detail
        assert find_suspects(connection, site.mapping, None, None) == []
    assert_true(site.host, site.mapping)


def test_grants_count_in_addition_to_the_subscriptions_tokens_when_these_change(attached: Site) -> None:
    site, (ann, _) = attached, attached.users
    with connect() as connection:
        grant_tokens(
            connection, ann, 500, reason="r", reference="r", by="ann", expires_at=datetime.now(UTC) + timedelta(days=1)
        )
        site.logs(ann, 10_400)
        site.do(site.more, ann, 2_000)
        hold_tokens(connection, ann, 10)
        account = read_account(connection, ann)
        assert (account.original, account.consumed) == (12_500, 10_400)
        # After its end a grant adds the tokens that it paid for: usage beyond the subscription's tokens of its time.
        later = read_account(connection, ann, now=datetime.now(UTC) + timedelta(days=2))
        assert later.original == 12_400
        summary = read_summary(connection, site.mapping, ann, with_plans=True)
    assert (summary.known, summary.account.original) == (True, 12_500)
    named = site.mapping.user.table is not None
    assert (summary.username, [plan.name for plan in summary.own_plans]) == (("Ann", ["Pro"]) if named else (None, []))


# tests/accounts/test_windows.py tests the same for hosts whose plans state the tokens.
@pytest.mark.parametrize("site", ["of little", "of expressions"], indirect=True)
def test_a_quota_that_changed_between_two_reads_is_recorded(attached: Site) -> None:
    site, (ann, _) = attached, attached.users
    with connect() as connection:
        grant_tokens(connection, ann, 500, reason="r", reference="r", by="ann")
    for change in (2_000, 0, -2_000, -10_100):
        site.do(site.more, ann, change)
    told = site.host.execute(
        "SELECT coalesce(plan_tokens, trueup.plan_size(token_plan_id, full_plan_id)) "
        "FROM trueup.window_change ORDER BY id"
    )
    assert list(told.scalars()) == [10_000, 10_000, 12_000, 12_000, 10_000, 10_000, 0]


def test_all_users_may_have_the_same_constant_number_of_tokens(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SUBSCRIPTION__TOKENS_INCLUDED", '{"value": 700}'), ("TOKEN_PLAN", "false")):
        monkeypatch.setenv(f"TRUEUP_HOST__{name}", value)
    get_settings.cache_clear()
    host.execute("ALTER TABLE billing_subscription DROP token_plan_id; DROP TABLE billing_tokenplan")
    with host.engine.begin() as connection:
        install(connection, get_settings().host, with_host_tables=False)
    user = host.subscriber(900, kind="full", counter=700)
    with connect() as connection:
        grant_tokens(connection, user, 50, reason="r", reference="r", by="ann")
        charge_tokens(connection, hold_tokens(connection, user, 750), 30)
        assert read_account(connection, user).original == 750
        [plan] = read_summary(connection, get_settings().host, user).own_plans
    assert plan.tokens_included == 900
    host.execute("UPDATE billing_subscription SET start_date = start_date + interval '1 day'")
    reconcile(get_engine(), get_settings().host, rules=NO_AGE)
    assert host.counter(user) == 720
    assert_true(host, get_settings().host)


def test_a_failed_call_gets_no_row_if_rows_can_not_record_the_failure(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_HOST__USAGE_LOG__SUCCESS", '{"value": true}')
    get_settings.cache_clear()
    host.execute("ALTER TABLE ai_usage_log DROP success")
    with host.engine.begin() as connection:
        install(connection, get_settings().host, with_host_tables=False)
    user = host.subscriber(1_000)
    figures = {"section": "chat", "prompt_tokens": 7, "completion_tokens": 3, "model_name": "m"}
    failed = {**figures, "success": False, "error_message": "no answer"}
    assert [track_ai_usage(user, **failed, key="1").recorded for _ in range(2)] == [True, False]
    assert track_ai_usage(user, **figures, key="1").recorded
    assert list(host.execute("SELECT total_tokens FROM ai_usage_log").scalars()) == [10]
    assert host.counter(user) == 990
    assert_true(host, get_settings().host)


def test_the_doctor_finds_no_problem(attached: Site) -> None:
    findings = examine_database(get_settings())
    told = [finding for finding in findings if finding.level != "ok" and finding.check != "rights"]
    assert told == []


def test_the_manual_names_every_setting() -> None:
    manual = MANUAL.read_text()
    for block in EXAMPLES:
        assert HostMapping.model_validate(tomllib.loads(block)["host"]) != HostMapping()
    for noun in ("user", "token_plan", "full_plan", "subscription", "usage_log", "token_usage", "payment"):
        kind = HostMapping.model_fields[noun].annotation
        assert kind is not None
        assert f"`[host.{noun}]`" in manual
        assert all(f"`{field}`" in manual for field in kind.model_fields if field != "table")


def test_least_privilege_roles_can_do_their_work(subscribed: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site, (ann, _) = subscribed, subscribed.users
    url, suffix = site.host.engine.url, str(site.host.engine.url.database)
    roles = RoleNames(migrate=f"m_{suffix}", worker=f"w_{suffix}", readonly=f"r_{suffix}")

    def grant() -> None:
        with site.host.engine.begin() as connection:
            connection.exec_driver_sql(f"REVOKE TEMPORARY ON DATABASE {suffix} FROM PUBLIC")
            for statement in grants_sql(connection, site.mapping, roles):
                connection.exec_driver_sql(statement)

    def become(role: str) -> None:
        monkeypatch.setenv("TRUEUP_DATABASE_URL", url.set(username=role).render_as_string(hide_password=False))
        dispose_engine()
        get_settings.cache_clear()

    try:
        grant()
        become(roles.migrate)
        assert attach(site.mapping) == {"balances": 2}
        grant()
        become(roles.worker)
        with connect() as connection:
            charge_tokens(connection, hold_tokens(connection, ann, 500), 200)
            written = [
                right.columns for right in worker_rights(connection, site.mapping) if right.privilege == "INSERT"
            ]
            assert set(written[0]) == set(site.mapping.usage_log.written)
        figures = {"section": "chat", "prompt_tokens": 2, "completion_tokens": 1, "model_name": "m"}
        assert track_ai_usage(ann, **figures, key="1").recorded
        assert track_ai_usage(ann, **figures, key="2", success=False, error_message="no answer").recorded
        site.logs(ann, 40)
        reconcile(get_engine(), site.mapping, rules=NO_AGE, kind="deep")
        assert site.left(ann) == 10_000 - 243
        become(roles.readonly)
        found: list[Finding] = []
        scan(get_engine(), site.mapping, lambda checked, findings: found.extend(findings))
        assert found == []
    finally:
        dispose_engine()
        for role in (roles.migrate, roles.worker, roles.readonly):
            site.host.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")
