"""Hosts with other names for all tables and columns: all steps from the setup to a corrected counter."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from tests.support.books import assert_true
from tests.support.host import START, Host, pooled_engine
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.accounts.grants import grant_tokens, list_grants, revoke_grant
from trueup.billing.decorators import check_tokens_for_function
from trueup.billing.utils import get_accurate_tokens_remaining
from trueup.database.engine import connect, get_engine, transaction
from trueup.errors import TokensDenied
from trueup.gate.holds import close_hold, expire_holds, list_holds
from trueup.host.fields import (
    FullPlanTable,
    PaymentTable,
    SubscriptionTable,
    TokenPlanTable,
    TokenUsageTable,
    UsageLogTable,
    UserTable,
)
from trueup.host.mapping import HostMapping
from trueup.host.sql import render_sql
from trueup.install.install import check_installed, install
from trueup.reconcile.local_run import reconcile
from trueup.reports.run_report import find_source, read_report, read_source, with_host_faults
from trueup.review.decisions import decide_drift, list_reviews, undo_run
from trueup.settings.policies import Rules
from trueup.settings.settings import get_settings
from trueup.usage.charges import find_answer
from trueup.usage.log import list_usage

ODD = {
    "user": UserTable(table="My App.The Users", id='the "id"', username="Name %s", email="e-mail"),
    "token_plan": TokenPlanTable(table="My App.select", id="ID", tokens_included="100% of :tokens"),
    "full_plan": FullPlanTable(table="fullPlan", tokens_included="tokens{{x}}"),
    "subscription": SubscriptionTable(
        table="My App.it's mine",
        id="p_user",
        user_id="user :id",
        start_date="at",
        end_date='"',
        tokens_remaining="übrig ; --",
        is_active="is",
    ),
    "usage_log": UsageLogTable(
        table='My App.log"s',
        id="\\id",
        user_id="held",
        section="sec%tion",
        total_tokens="p_total",
        success="consumed",
        metadata="$1",
        created_at="late",
    ),
}

ODD_BOOKS = {
    "token_usage": TokenUsageTable(
        table="My App.it's -- used", id="tokens", subscription_id="p users", used_tokens="at", usage_date='kind"'
    ),
    "payment": PaymentTable(
        table="pay : %s",
        id="own_plan",
        user_id="user_id",
        token_plan_id="since",
        full_plan_id="n",
        status="p",
        payment_date="base_at",
        transaction_id="{{x}}",
        completed_status="it's 100% \\ :paid",
    ),
}

MAPPINGS = {
    "odd bigint": HostMapping(**ODD),
    "odd bigint, with decrements and payments": HostMapping(**ODD, **ODD_BOOKS),
    "odd bigint, with payments of plans without a duration": HostMapping(
        **ODD | {"full_plan": FullPlanTable(table=None)}, **ODD_BOOKS
    ),
    "odd uuid, text log ids": HostMapping(**ODD, user_id_type="uuid", usage_log_id_type="text"),
    "odd text": HostMapping(**ODD, user_id_type="text"),
    "plain uuid": HostMapping(user_id_type="uuid"),
    "plain text": HostMapping(user_id_type="text", usage_log_id_type="text"),
}
USERS: dict[str, tuple[Any, Any]] = {
    "bigint": (-7, 2**40),
    "uuid": (uuid.UUID(int=5), uuid.UUID(int=2**100)),
    "text": ("it's {a} %s :user \\", "ü" * 50),
}


@pytest.fixture(params=MAPPINGS)
def mapping(request: pytest.FixtureRequest, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> HostMapping:
    mapping = MAPPINGS[request.param]
    monkeypatch.setenv("TRUEUP_HOST", mapping.model_dump_json())
    get_settings.cache_clear()
    assert get_settings().host == mapping
    return mapping


@pytest.fixture
def mapped_host(mapping: HostMapping, empty_database: str) -> Iterator[Host]:
    engine: Engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        connection.execute(text('CREATE SCHEMA "My App"'))
        install(connection, mapping, with_host_tables=True)
    with Host(engine) as host:
        yield host
    engine.dispose()


def do(host: Host, mapping: HostMapping, statement: str, values: list[Any]) -> None:
    """Run the host's own SQL under its own names."""
    raw = host.connection.connection.driver_connection
    assert raw is not None
    raw.execute(render_sql(statement, mapping).replace("%", "%%").replace("?", "%s"), values)


def subscribe(host: Host, mapping: HostMapping, user: Any, number: int) -> None:
    do(
        host,
        mapping,
        "INSERT INTO {{ user }} ({{ user.id }}, {{ user.username() }}, {{ user.email() }}) VALUES (?, ?, '')",
        [user, number],
    )
    do(
        host,
        mapping,
        "INSERT INTO {{ token_plan }} ({{ token_plan.id }}, {{ token_plan.name() }}, {{ token_plan.tokens_included }}) "
        "VALUES (?, '', 10000)",
        [number],
    )
    do(
        host,
        mapping,
        "INSERT INTO {{ subscription }} ({{ subscription.id }}, {{ subscription.user_id }}, "
        "{{ subscription.token_plan_id() }}, {{ subscription.start_date }}, {{ subscription.tokens_remaining }}) "
        "VALUES (?, ?, ?, ?, 10000)",
        [number, user, number, START],
    )


LOG = (
    "INSERT INTO {{ usage_log }} ({{ usage_log.user_id }}, {{ usage_log.section() }}, {{ usage_log.total_tokens }}) "
    "VALUES (?, 'chat', ?)"
)


def lower(host: Host, mapping: HostMapping, user: Any, tokens: int) -> None:
    """Lower the counter, and add the host's decrement row."""
    do(
        host,
        mapping,
        "UPDATE {{ subscription }} SET {{ subscription.tokens_remaining }} = {{ subscription.tokens_remaining }} - ? "
        "WHERE {{ subscription.user_id }} = ?",
        [tokens, user],
    )
    if mapping.token_usage.table:
        do(
            host,
            mapping,
            "INSERT INTO {{ token_usage }} ({{ token_usage.subscription_id }}, {{ token_usage.used_tokens }}) "
            "SELECT {{ subscription.id }}, ? FROM {{ subscription }} WHERE {{ subscription.user_id }} = ?",
            [tokens, user],
        )


def test_all_steps_work_with_the_hosts_names(mapped_host: Host, mapping: HostMapping) -> None:
    host = mapped_host
    users = USERS[mapping.user_id_type]
    for number, user in enumerate(users, 1):
        subscribe(host, mapping, user, number)
    user = users[0]
    do(host, mapping, LOG, [user, 1_000])
    assert get_accurate_tokens_remaining(user) == (10_000, 1_000, 9_000)
    with connect() as connection:
        check_installed(connection)
        hold = hold_tokens(connection, user, 5_000, task="t")
        hold_tokens(connection, users[1], 10, task="t")
        charge_tokens(connection, hold, 200, metadata={"task_id": "t"}, answer={"text": "hi"})
        do(host, mapping, LOG, [user, 30])
        do(host, mapping, "UPDATE {{ usage_log }} SET {{ usage_log.total_tokens }} = 40 WHERE "
           "{{ usage_log.total_tokens }} = 30", [])  # fmt: skip
        assert_true(host, mapping)
        assert check_tokens_for_function(user)["tokens_available"] == 10_000 - 1_240 - 4_800
        with pytest.raises(TokensDenied):
            hold_tokens(connection, user, 4_000)
        assert find_answer(connection, hold, "1") == {"text": "hi"}
        assert [(row.user_id, row.tokens_left) for row in list_holds(connection, user_id=user)] == [(user, 4_800)]
        assert [row.task_id for row in list_usage(connection, mapping, user) if row.total_tokens == 200] == ["t"]
        assert close_hold(connection, hold) == "settled"
        expire_holds(connection)
        lower(host, mapping, user, 40)
        reconcile(get_engine(), mapping, rules=Rules(min_age_seconds=0), batch_size=1)
        report = read_report(connection, mapping.user_id_type)
        assert report is not None
        assert [(row.user_id, row.observed, row.written) for row in report.rows] == [(user, 9_760, 8_760)]
        assert report.as_json()["rows"][0]["user_id"] == (user if isinstance(user, int) else str(user))
        with transaction() as connection:
            source = find_source(connection, mapping.user_id_type)
            assert source is not None
            report = with_host_faults(connection, mapping, source, read_source(connection, source), min_age_seconds=0)
            assert report.systemic == []
        again = reconcile(get_engine(), mapping, only_user=user)
    assert (again.checked, again.drifted) == (1, 0)
    assert_true(host, mapping)
    do(host, mapping, "TRUNCATE {{ usage_log }}", [])
    assert get_accurate_tokens_remaining(user) == (10_000, 0, 10_000)
    host.connection.execute(
        text("INSERT INTO trueup.token_grant (user_id, tokens, reason) VALUES (:user, 500, 'a top-up')"), {"user": user}
    )
    assert get_accurate_tokens_remaining(user) == (10_500, 0, 10_500)


def test_grants_and_decisions_work_with_the_hosts_names(mapped_host: Host, mapping: HostMapping) -> None:
    host = mapped_host
    users = USERS[mapping.user_id_type]
    for number, user in enumerate(users, 1):
        subscribe(host, mapping, user, number)
        do(host, mapping, LOG, [user, 400 * number])
    with connect() as connection:
        rules = Rules(min_age_seconds=0)
        run = reconcile(get_engine(), mapping, rules=rules)
        assert run.run_id is not None
        assert undo_run(connection, run.run_id, mapping.user_id_type, by="ann", note="n", batch_size=1).counters == 2
        reconcile(get_engine(), mapping, rules=rules)
        items = {item.user_id: item for item in list_reviews(connection, mapping.user_id_type)}
        assert {user: item.tokens for user, item in items.items()} == {users[0]: 400, users[1]: 800}
        assert [item.user_id for item in list_reviews(connection, mapping.user_id_type, user_id=users[0])] == [users[0]]
        assert decide_drift(connection, items[users[0]].id, "accept", by="ann", note="n").counter_after == 9_600
        decide_drift(connection, items[users[1]].id, "grant", by="ann", note="n", reference="tx")
        assert reconcile(get_engine(), mapping, rules=rules).drifted == 0
        user = users[1]
        ends = datetime.now(UTC) + timedelta(days=1)
        grant = grant_tokens(connection, user, 50, reason="r", reference="r", by="ann", expires_at=ends)
        do(host, mapping, LOG, [user, 20])
        later = ends + timedelta(days=1)
        assert read_account(connection, user, now=later).original == 10_820
        assert revoke_grant(connection, user, grant.id, reason="r", by="ann") == 30
        assert [(one.tokens, one.tokens_used, one.tokens_left) for one in list_grants(connection, user)] == [
            (50, 20, 0),
            (800, 0, 800),
        ]
    assert_true(host, mapping)


def test_the_setup_may_be_repeated_with_the_hosts_names(mapped_host: Host, mapping: HostMapping) -> None:
    with mapped_host.engine.begin() as connection:
        install(connection, mapping, with_host_tables=True)
    mapped_host.execute("SELECT trueup.counter_limit()")
    assert mapped_host.value("SELECT trueup.counter_limit()") == 2**31 - 1
    assert mapped_host.value("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'trueup%'") == 5


def test_32_bit_user_ids_and_varchar_columns_are_accepted(database: str, host: Host) -> None:
    """Older Django applications have them."""
    host.execute(
        "ALTER TABLE accounts_user ALTER id TYPE int; ALTER TABLE billing_subscription ALTER user_id TYPE int, "
        "ALTER id TYPE int; ALTER TABLE ai_usage_log ALTER user_id TYPE int, ALTER total_tokens TYPE bigint"
    )
    with host.engine.begin() as connection:
        install(connection, HostMapping(), with_host_tables=False)
    user = host.subscriber(1_000)
    host.log(user, 10)
    with connect() as connection:
        charge_tokens(connection, hold_tokens(connection, user, 500), 100)
    reconcile(get_engine(), HostMapping())
    assert host.counter(user) == 890
    assert_true(host)
