"""Rows whose tokens add up to more than a bigint holds concern their own user alone."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine

from tests.conftest import template_for
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.work import balance, charge_tokens, hold_tokens, usage_of
from trueup.accounts.account import read_account
from trueup.database.engine import get_engine
from trueup.errors import TokensDenied
from trueup.gate.holds import close_hold
from trueup.gate.provider_calls import extend_hold
from trueup.host.mapping import HostMapping
from trueup.host.sql import UNCOUNTABLE
from trueup.preview.scan import scan
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import Finding
from trueup.stack import StackUrls
from trueup.usage.charges import record_charge

LOWEST, HIGHEST = -(2**63), 2**63 - 1
WAYS = [[LOWEST], [HIGHEST], [HIGHEST, HIGHEST], [LOWEST, LOWEST, 5]]


@pytest.fixture(scope="module")
def template_database(stack: StackUrls, admin_engine: Engine, plain_template: str) -> Iterator[str]:
    bigint = "ALTER TABLE ai_usage_log ALTER total_tokens TYPE bigint"
    with template_for(stack, admin_engine, plain_template, HostMapping(), bigint) as name:
        yield name


@pytest.fixture
def user(host: Host) -> int:
    host.execute("TRUNCATE ai_usage_log")  # the log has an epoch then; a balance of -1 is of none
    return host.subscriber(1_000)


def refusal(connection: Connection, user: int) -> str:
    with pytest.raises(TokensDenied) as denied:
        hold_tokens(connection, user, 10)
    return f"{denied.value}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("known", [True, False])
def test_the_gate_of_the_user_is_closed_until_the_host_corrects_the_rows(
    host: Host, connection: Connection, user: int, way: list[int], known: bool
) -> None:
    if known:
        close_hold(connection, hold_tokens(connection, user, 10))
    for tokens in way:
        host.log(user, tokens)
    said = "The usage log's rows of this user add up to more than can be counted (usage_uncountable)"
    assert [refusal(connection, user), refusal(connection, user)] == [said, said]
    assert (read_account(connection, user).remaining, read_account(connection, user).available) == (0, 0)
    host.execute("UPDATE ai_usage_log SET total_tokens = 20 WHERE total_tokens <> 5")
    expected = 20 * sum(tokens != 5 for tokens in way) + 5 * way.count(5)
    assert read_account(connection, user).consumed == expected
    hold_tokens(connection, user, 10)
    assert balance(host, user) == (expected, 10)
    assert_true(host)


@pytest.mark.parametrize("way", WAYS)
def test_the_host_can_delete_such_rows(host: Host, connection: Connection, user: int, way: list[int]) -> None:
    host.log(user, 30)
    rows = [host.log(user, tokens) for tokens in way]
    for row in rows:
        host.execute("DELETE FROM ai_usage_log WHERE id = :row", row=row)
    hold_tokens(connection, user, 10)
    assert balance(host, user) == (30, 10)


@pytest.mark.parametrize("way", WAYS)
def test_a_charge_of_the_user_is_recorded(host: Host, connection: Connection, user: int, way: list[int]) -> None:
    hold = hold_tokens(connection, user, 100)
    for tokens in way:
        host.log(user, tokens)
    assert charge_tokens(connection, hold, 70).recorded
    assert host.value("SELECT count(*) FROM ai_usage_log WHERE total_tokens = 70") == 1
    host.execute("UPDATE ai_usage_log SET total_tokens = 20 WHERE total_tokens <> 70")
    hold_tokens(connection, user, 10)
    assert balance(host, user) == (70 + 20 * len(way), 40)
    assert_true(host)


def test_charges_that_add_up_to_more_than_can_be_counted_are_recorded(
    host: Host, connection: Connection, user: int
) -> None:
    hold = hold_tokens(connection, user, 100)
    row = host.log(user, UNCOUNTABLE - 1)
    refusal(connection, user)  # which brings the balance up to date
    for key in "abc":
        usage = usage_of(0, total_tokens=UNCOUNTABLE)
        assert record_charge(connection, hold, call_key=key, usage=usage).recorded
    assert "can be counted" in refusal(connection, user)
    host.execute("DELETE FROM ai_usage_log WHERE id <> :row", row=row)
    host.execute("UPDATE ai_usage_log SET total_tokens = 20")
    assert read_account(connection, user).consumed == 20
    assert_true(host)


@pytest.mark.parametrize("way", WAYS)
def test_a_hold_of_the_user_is_not_extended(host: Host, connection: Connection, user: int, way: list[int]) -> None:
    hold = hold_tokens(connection, user, 100)
    for tokens in way:
        host.log(user, tokens)
    assert extend_hold(connection, hold, 10) == ("usage_uncountable", 100)
    host.execute("UPDATE ai_usage_log SET total_tokens = 20")
    assert extend_hold(connection, hold, 10) == (None, 110)
    assert balance(host, user) == (20 * len(way), 110)
    assert_true(host)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_grant", [True, False])
@pytest.mark.parametrize("kind", ["quick", "deep"])
def test_reconcile_sets_the_user_aside_and_corrects_all_others(
    host: Host, connection: Connection, user: int, way: list[int], with_grant: bool, kind: str
) -> None:
    other = host.subscriber(1_000, counter=3)
    if with_grant:
        host.execute(
            "INSERT INTO trueup.token_grant (user_id, tokens, granted_at, expires_at, reason, granted_by) "
            "VALUES (:user, 100, now() - interval '3 days', now() - interval '1 day', '', 'test')",
            user=user,
        )
    host.log(other, 100)
    for tokens in way:
        host.log(user, tokens)
    summary = reconcile(get_engine(), HostMapping(), kind=kind, keep_findings=True)  # type: ignore[arg-type]
    assert summary.status == "finished"
    assert [finding.drift.user_id for finding in summary.findings] == [other]
    assert host.counter(user) == 1_000
    defects = host.execute("SELECT kind, user_id, detail ->> 'remedy' FROM trueup.defect").all()
    assert [(row[0], row[1]) for row in defects] == [("usage_uncountable", user)]
    assert all("correct or delete them" in row[2] for row in defects)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("indexed", [True, False])
def test_the_read_only_report_sets_the_user_aside(host: Host, user: int, way: list[int], indexed: bool) -> None:
    other = host.subscriber(1_000, counter=3)
    for tokens in way:
        host.log(user, tokens)
    host.log(other, 100)
    if not indexed:
        host.execute("DROP INDEX ai_usage_log_user_created")
    found: list[Finding] = []
    outcome = scan(get_engine(), HostMapping(), lambda _, findings: found.extend(findings))
    assert [finding.drift.user_id for finding in found] == [other]
    assert [note for note in outcome.notes if note.startswith(f"User {user} was set aside.")]
