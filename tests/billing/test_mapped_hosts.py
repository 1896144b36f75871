"""Hosts that name everything otherwise: the whole way, from the setup to a corrected counter, under their names."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from billing import db
from billing.charges import find_answer
from billing.decorators import check_tokens_for_function
from billing.drift_reports import read_report
from billing.errors import TokensDenied
from billing.holds import close_hold, expire_holds, list_holds
from billing.install import check_installed, install
from billing.mapping import (
    FullPlanTable,
    HostMapping,
    SubscriptionTable,
    TokenPlanTable,
    UsageLogTable,
    UserTable,
    render_sql,
)
from billing.reconcile import reconcile
from billing.settings import get_settings
from billing.usage import list_usage
from billing.utils import get_accurate_tokens_remaining
from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.work import charge_tokens, hold_tokens

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

MAPPINGS = {
    "odd bigint": HostMapping(**ODD),
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
    engine: Engine = create_engine(empty_database, poolclass=NullPool)
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
        "INSERT INTO {{user}} ({{user.id}}, {{user.username}}, {{user.email}}) VALUES (?, ?, '')",
        [user, number],
    )
    do(
        host,
        mapping,
        "INSERT INTO {{token_plan}} ({{token_plan.id}}, {{token_plan.name}}, {{token_plan.tokens_included}}) "
        "VALUES (?, '', 10000)",
        [number],
    )
    do(
        host,
        mapping,
        "INSERT INTO {{subscription}} ({{subscription.id}}, {{subscription.user_id}}, {{subscription.token_plan_id}}, "
        "{{subscription.start_date}}, {{subscription.tokens_remaining}}) VALUES (?, ?, ?, ?, 10000)",
        [number, user, number, START],
    )


LOG = (
    "INSERT INTO {{usage_log}} ({{usage_log.user_id}}, {{usage_log.section}}, {{usage_log.total_tokens}}) "
    "VALUES (?, 'chat', ?)"
)


def test_the_whole_way_works_under_the_hosts_names(mapped_host: Host, mapping: HostMapping) -> None:
    host = mapped_host
    users = USERS[mapping.user_id_type]
    for number, user in enumerate(users, 1):
        subscribe(host, mapping, user, number)
    user = users[0]
    do(host, mapping, LOG, [user, 1_000])
    assert get_accurate_tokens_remaining(user) == (10_000, 1_000, 9_000)
    with db.connect() as connection:
        check_installed(connection)
        hold = hold_tokens(connection, user, 5_000, task="t")
        hold_tokens(connection, users[1], 10, task="t")
        charge_tokens(connection, hold, 200, metadata={"task_id": "t"}, answer={"text": "hi"})
        do(host, mapping, LOG, [user, 30])
        do(host, mapping, "UPDATE {{usage_log}} SET {{usage_log.total_tokens}} = 40 WHERE "
           "{{usage_log.total_tokens}} = 30", [])  # fmt: skip
        assert_true(host, mapping)
        assert check_tokens_for_function(user)["tokens_available"] == 10_000 - 1_240 - 4_800
        with pytest.raises(TokensDenied):
            hold_tokens(connection, user, 4_000)
        assert find_answer(connection, hold, "1") == {"text": "hi"}
        assert [(row.user_id, row.tokens_left) for row in list_holds(connection, user_id=user)] == [(user, 4_800)]
        assert [row.task_id for row in list_usage(connection, mapping, user) if row.total_tokens == 200] == ["t"]
        assert close_hold(connection, hold) == "settled"
        expire_holds(connection)
        reconcile(db.get_engine(), mapping, batch_size=1)
        report = read_report(connection, mapping.user_id_type)
        assert report is not None
        assert [(row.user_id, row.observed, row.written) for row in report.rows] == [(user, 9_800, 8_760)]
        assert report.as_json()["rows"][0]["user_id"] == (user if isinstance(user, int) else str(user))
        again = reconcile(db.get_engine(), mapping, only_user=user)
    assert (again.checked, again.drifted) == (1, 0)
    assert_true(host, mapping)
    do(host, mapping, "TRUNCATE {{usage_log}}", [])
    assert get_accurate_tokens_remaining(user) == (10_000, 0, 10_000)
    host.connection.execute(
        text("INSERT INTO trueup.token_grant (user_id, tokens, reason) VALUES (:user, 500, 'a top-up')"), {"user": user}
    )
    assert get_accurate_tokens_remaining(user) == (10_500, 0, 10_500)


def test_the_setup_may_be_repeated_under_the_hosts_names(mapped_host: Host, mapping: HostMapping) -> None:
    with mapped_host.engine.begin() as connection:
        install(connection, mapping, with_host_tables=True)
    mapped_host.execute("SELECT trueup.counter_limit()")
    assert mapped_host.value("SELECT trueup.counter_limit()") == 2**31 - 1
    assert mapped_host.value("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'trueup%'") == 4


def test_32_bit_user_ids_and_varchar_columns_are_taken(database: str, host: Host) -> None:
    """Older Django applications have them."""
    host.execute(
        "ALTER TABLE accounts_user ALTER id TYPE int; ALTER TABLE billing_subscription ALTER user_id TYPE int, "
        "ALTER id TYPE int; ALTER TABLE ai_usage_log ALTER user_id TYPE int, ALTER total_tokens TYPE bigint"
    )
    with host.engine.begin() as connection:
        install(connection, HostMapping(), with_host_tables=False)
    user = host.subscriber(1_000)
    host.log(user, 10)
    with db.connect() as connection:
        charge_tokens(connection, hold_tokens(connection, user, 500), 100)
    reconcile(db.get_engine(), HostMapping())
    assert host.counter(user) == 890
    assert_true(host)
