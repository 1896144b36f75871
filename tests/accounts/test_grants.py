from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from tests.support.books import assert_true, dump
from tests.support.host import START, Host
from tests.support.sessions import run_at_once
from tests.support.work import hold_tokens
from trueup.accounts.account import read_account
from trueup.accounts.grants import Granted, GrantRefusedError, grant_tokens, list_grants, revoke_grant
from trueup.accounts.payments import PaymentsNotMappedError, import_payments
from trueup.database.engine import connect, get_engine
from trueup.errors import InvalidInputError, TokensDenied, UnknownUserError
from trueup.host.fields import PaymentTable
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile

pytestmark = pytest.mark.dated

DAY = timedelta(days=1)
PLAN = 1_000


def give(connection: Connection, user: int, tokens: int, *, at: datetime = START, **more: Any) -> int:
    """Grant tokens under a unique reference. Returns the grant's id."""
    number = connection.scalar(text("SELECT count(*) FROM trueup.token_grant"))
    values = {"reason": "test", "reference": f"r{number}", "by": "ann", **more}
    return grant_tokens(connection, user, tokens, now=at, **values).id


def original(connection: Connection, user: int, now: datetime) -> int:
    return read_account(connection, user, now=now).original


def renew(host: Host, start: datetime, at: datetime | None = None) -> None:
    """Move the window at the time `at`."""
    host.execute("UPDATE billing_subscription SET start_date = :start", start=start)
    if at is not None:
        host.date_change(at)


def lock(connection: Connection, user: int, now: datetime) -> None:
    """Bring the balance up to date, as a gate does."""
    hold_tokens(connection, user, 0, now=now)


def test_a_grant_is_given_once_per_reference(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    more = {"reason": "a gift", "reference": "tx", "by": "ann", "expires_at": START + DAY, "now": START}
    first = grant_tokens(connection, user, 50, **more)
    assert first == Granted(id=first.id, already=False)
    for now in (START, START + 2 * DAY):
        assert grant_tokens(connection, user, 50, **more | {"now": now}) == Granted(id=first.id, already=True)
    for wrong in ({"tokens": 51}, {"expires_at": None}, {"expires_at": START + 2 * DAY}):
        with pytest.raises(GrantRefusedError, match="'tx' belongs to grant"):
            grant_tokens(connection, user, **{"tokens": 50, **more, **wrong})
    # References are unique for each user only.
    assert not grant_tokens(connection, host.subscriber(PLAN), 50, **more).already
    assert host.execute("SELECT reason, granted_by, granted_at FROM trueup.token_grant ORDER BY id").all()[0] == (
        "a gift",
        "ann",
        START,
    )


def test_concurrent_grants_under_one_reference_are_one_grant(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)

    def grant() -> Granted:
        with connect() as connection:
            return grant_tokens(connection, user, 50, reason="r", reference="tx", by="ann")

    given = run_at_once([grant] * 6)
    assert len({one.id for one in given}) == 1
    assert sorted(one.already for one in given) == [False] + [True] * 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"tokens": -1},
        {"tokens": 2**63},
        {"tokens": True},
        {"tokens": 1.5},
        {"reason": ""},
        {"reference": " "},
        {"by": "\x00"},
        {"by": ""},
        {"expires_at": START},
        {"expires_at": START - DAY},
    ],
)
def test_a_malformed_grant_is_refused_and_nothing_is_written(
    host: Host, connection: Connection, wrong: dict[str, Any]
) -> None:
    user = host.subscriber(PLAN)
    values = {"tokens": 50, "reason": "r", "reference": "tx", "by": "ann", "now": START, **wrong}
    with pytest.raises(InvalidInputError):
        grant_tokens(connection, user, **values)
    assert host.value("SELECT count(*) FROM trueup.token_grant") == 0


def test_a_user_without_a_subscription_is_refused(host: Host, connection: Connection) -> None:
    for user in (host.user(), 999_999):
        with pytest.raises(UnknownUserError, match=str(user)):
            give(connection, user, 50)


def test_the_largest_grants_do_not_overflow(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    for _ in range(3):
        give(connection, user, 2**63 - 1)
    assert original(connection, user, START) == 2**62
    lock(connection, user, START)
    renew(host, START + DAY)
    lock(connection, user, START + DAY)
    assert original(connection, user, START + DAY) == 2**62


def test_the_largest_grant_and_a_refund_do_not_stop_a_reconcile_run(host: Host, connection: Connection) -> None:
    user, other = host.subscriber(PLAN), host.subscriber(PLAN, counter=5)
    give(connection, user, 2**63 - 1)
    host.log(user, -50)
    reconcile(get_engine(), HostMapping())
    assert host.counter(other) == PLAN


def test_the_expiry_of_a_grant_removes_only_its_unused_tokens(host: Host, connection: Connection) -> None:
    """The grant is used first: it has paid for 300 of the 500 tokens, and the plan for none."""
    user = host.subscriber(PLAN)
    give(connection, user, 500, expires_at=START + DAY)
    host.log(user, 300, at=START + timedelta(hours=1))
    assert original(connection, user, START + timedelta(hours=2)) == 1_500
    for settled in (False, True):
        if settled:
            lock(connection, user, START + 2 * DAY)
        account = read_account(connection, user, now=START + 2 * DAY)
        assert (account.original, account.remaining) == (1_300, 1_000)


def test_a_late_settlement_creates_no_tokens(host: Host, connection: Connection) -> None:
    """The plan pays for usage after the end of the grant, however late the settlement is."""
    user = host.subscriber(PLAN)
    give(connection, user, 500, expires_at=START + DAY)
    host.log(user, 300, at=START + timedelta(hours=1))
    host.log(user, 150, at=START + DAY)
    assert original(connection, user, START + 9 * DAY) == 1_300
    lock(connection, user, START + 9 * DAY)
    assert read_account(connection, user, now=START + 9 * DAY).remaining == 850
    # The use is settled once: the plan pays for usage that the host logs later with an earlier time.
    host.log(user, 100, at=START + timedelta(hours=2))
    assert original(connection, user, START + 9 * DAY) == 1_300
    assert_true(host)


def test_a_grant_does_not_pay_for_usage_before_it_was_given(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    host.log(user, 800, at=START + timedelta(hours=1))
    give(connection, user, 500, at=START + timedelta(hours=2), expires_at=START + DAY)
    host.log(user, 100, at=START + timedelta(hours=3))
    assert original(connection, user, START + 2 * DAY) == 1_100


def test_a_grant_pays_for_the_users_overdraft_before_it_was_given(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    host.log(user, 1_200, at=START + timedelta(hours=1))
    give(connection, user, 500, at=START + timedelta(hours=2), expires_at=START + DAY)
    assert read_account(connection, user, now=START + timedelta(hours=3)).remaining == 300
    assert original(connection, user, START + 2 * DAY) == 1_200


def test_the_grant_that_expires_first_is_used_first(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    late = give(connection, user, 200, expires_at=START + 3 * DAY)
    soon = give(connection, user, 200, expires_at=START + DAY)
    never = give(connection, user, 200)
    host.log(user, 300, at=START + timedelta(hours=1))
    used = {grant.id: grant.tokens_used for grant in list_grants(connection, user, now=START + timedelta(hours=2))}
    assert used == {soon: 200, late: 100, never: 0}


def test_grants_without_an_expiry_are_used_after_the_plan_and_the_oldest_first(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(PLAN)
    old, new = give(connection, user, 200), give(connection, user, 200)
    host.log(user, 1_250, at=START + timedelta(hours=1))
    used = {grant.id: grant.tokens_used for grant in list_grants(connection, user, now=START + DAY)}
    assert used == {old: 200, new: 50}


@pytest.mark.parametrize("noticed", ["at once", "never", "late"])
def test_a_renewal_keeps_the_unused_tokens_of_grants(host: Host, connection: Connection, noticed: str) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 1_200, at=START + timedelta(hours=1))
    renew(host, START + 30 * DAY)
    now = START + 30 * DAY
    if noticed == "late":
        host.log(user, 400, at=START + 31 * DAY)
        now = START + 32 * DAY
    if noticed != "never":
        lock(connection, user, now)
    assert original(connection, user, now) == PLAN + 300
    # They also carry over into the window after it, which used none of them.
    renew(host, START + 60 * DAY)
    assert original(connection, user, START + 60 * DAY) == PLAN + 300
    lock(connection, user, START + 60 * DAY)
    assert original(connection, user, START + 60 * DAY) == PLAN + 300


def test_plan_and_window_may_change_at_once(host: Host, connection: Connection) -> None:
    """The old window's use of the grant depends on the plan that it had."""
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 1_200, at=START + timedelta(hours=1))
    host.execute("UPDATE billing_subscription SET token_plan_id = :plan", plan=host.plan(5_000))
    renew(host, START + 30 * DAY)
    for _ in range(2):
        assert original(connection, user, START + 30 * DAY) == 5_300
        lock(connection, user, START + 30 * DAY)


def test_a_window_that_moves_back_makes_later_uses_void(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500)
    host.log(user, 1_200, at=START + timedelta(hours=1))
    renew(host, START + 30 * DAY)
    lock(connection, user, START + 30 * DAY)
    assert original(connection, user, START + 30 * DAY) == 1_300
    renew(host, START)
    for _ in range(2):
        account = read_account(connection, user, now=START + 30 * DAY)
        assert (account.original, account.remaining) == (1_500, 300)
        lock(connection, user, START + 30 * DAY)
    renew(host, START + 30 * DAY)
    lock(connection, user, START + 30 * DAY)
    assert original(connection, user, START + 30 * DAY) == 1_300


def test_a_grant_that_ends_after_the_window_moved_back_is_settled_again(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500, expires_at=START + 40 * DAY)
    host.log(user, 100, at=START + DAY)
    host.log(user, 150, at=START + 31 * DAY)
    for start in (START + 30 * DAY, START):
        renew(host, start)
        lock(connection, user, START + 32 * DAY)
    for _ in range(2):
        assert original(connection, user, START + 41 * DAY) == PLAN + 250
        lock(connection, user, START + 41 * DAY)


def test_a_grant_may_live_through_a_renewal_and_expire_in_the_next_window(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500, expires_at=START + 40 * DAY)
    host.log(user, 100, at=START + DAY)
    renew(host, START + 30 * DAY)
    host.log(user, 150, at=START + 31 * DAY)
    for now, expected in ((START + 32 * DAY, PLAN + 400), (START + 40 * DAY, PLAN + 150)):
        for _ in range(2):
            assert original(connection, user, now) == expected
            lock(connection, user, now)
    renew(host, START + 60 * DAY)
    assert original(connection, user, START + 60 * DAY) == PLAN


def test_a_revocation_removes_only_unused_tokens(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    number = give(connection, user, 500)
    host.log(user, 1_200, at=START + timedelta(hours=1))
    assert revoke_grant(connection, user, number, reason="bounced", by="bob", now=START + DAY) == 300
    account = read_account(connection, user, now=START + DAY)
    assert (account.original, account.remaining) == (1_200, 0)
    assert revoke_grant(connection, user, number, reason="again", by="eve", now=START + 2 * DAY) is None
    (grant,) = list_grants(connection, user, now=START + 2 * DAY)
    assert (grant.status, grant.tokens_used, grant.tokens_left) == ("revoked", 200, 0)
    assert (grant.revoked_by, grant.revoke_reason) == ("bob", "bounced")
    with pytest.raises(GrantRefusedError, match="revoked"):
        grant_tokens(connection, user, 500, reason="r", reference="r0", by="ann", now=START + DAY)


def test_a_grant_that_does_not_exist_or_has_expired_can_not_be_revoked(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    number = give(connection, user, 500, expires_at=START + DAY)
    with pytest.raises(GrantRefusedError, match="has expired"):
        revoke_grant(connection, user, number, reason="r", by="ann", now=START + DAY)
    for who, what in ((user, number + 1), (host.subscriber(PLAN), number)):
        with pytest.raises(GrantRefusedError, match=f"no grant {what}"):
            revoke_grant(connection, who, what, reason="r", by="ann")


def test_the_gate_counts_grants_and_ends(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 500, expires_at=START + DAY)
    host.log(user, 300, at=START + timedelta(hours=1))
    hold_tokens(connection, user, 1_200, now=START + timedelta(hours=2), ttl=60)
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 1_001, now=START + DAY)
    hold_tokens(connection, user, 1_000, now=START + DAY)


def test_a_reconcile_run_settles_ended_grants(host: Host, connection: Connection) -> None:
    """Later reads then need not read the log."""
    user = host.subscriber(PLAN, counter=1_000)
    give(connection, user, 500, expires_at=START + DAY)
    host.log(user, 300, at=START + timedelta(hours=1))
    lock(connection, user, START + timedelta(hours=2))
    reconcile(get_engine(), HostMapping())
    assert host.execute("SELECT window_start, tokens FROM trueup.grant_use").all() == [(START, 300)]
    assert host.counter(user) == 1_000


def test_a_list_shows_the_status_of_each_grant_and_changes_nothing(host: Host, connection: Connection) -> None:
    user = host.subscriber(PLAN)
    give(connection, user, 10, expires_at=START + DAY)
    give(connection, user, 20, at=START + 9 * DAY)
    give(connection, user, 30)
    before = dump(host)
    listed = list_grants(connection, user, now=START + 2 * DAY)
    assert [(grant.tokens, grant.status, grant.tokens_left) for grant in listed] == [
        (30, "live", 30),
        (20, "later", 20),
        (10, "expired", 0),
    ]
    assert dump(host) == before
    assert list_grants(connection, host.user()) == []
    # The used tokens stay used when the subscription is deleted.
    renew(host, START + 2 * DAY)
    host.execute("DELETE FROM billing_subscription")
    assert [grant.tokens for grant in list_grants(connection, user)] == [30, 20, 10]


def test_a_user_without_grants_costs_one_index_lookup(host: Host, connection: Connection) -> None:
    without, has = host.subscriber(PLAN), host.subscriber(PLAN)
    give(connection, has, 5)
    host.execute(
        "CREATE OR REPLACE FUNCTION trueup.granted(p_user bigint, p_window timestamptz, p_plan bigint, "
        "p_at timestamptz) RETURNS numeric LANGUAGE plpgsql STABLE AS $$ BEGIN RAISE EXCEPTION 'called'; END $$"
    )
    assert original(connection, without, START) == PLAN
    lock(connection, without, START)
    with pytest.raises(DBAPIError, match="called"):
        original(connection, has, START)


@pytest.fixture
def paying(empty_database: str) -> Any:
    """Yield a host whose payments are mapped, and its mapping."""
    mapping = HostMapping(payment=PaymentTable(table="billing_payment"))
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        install(connection, mapping, with_host_tables=True)
    with Host(engine) as host:
        yield host, mapping
    engine.dispose()


def pay(
    host: Host, user: int, plan: int | None, reference: str | None, *, at: datetime, status: str = "completed"
) -> None:
    host.execute(
        "INSERT INTO billing_payment (id, user_id, subscription_id, token_plan_id, status, payment_date, "
        "transaction_id) SELECT coalesce(max(p.id), 0) + 1, :user, "
        "(SELECT id FROM billing_subscription WHERE user_id = :user), :plan, "
        ":status, :at, :reference FROM billing_payment p",
        user=user,
        plan=plan,
        status=status,
        at=at,
        reference=reference,
    )


def test_each_paid_pack_becomes_one_grant(paying: Any) -> None:
    host, mapping = paying
    user, pack = host.subscriber(PLAN), host.plan(500)
    own = host.value("SELECT token_plan_id FROM billing_subscription")
    pay(host, user, pack, "tx-1", at=START + DAY)
    pay(host, user, pack, "", at=START + 2 * DAY)
    for plan, reference, at, status in (
        (own, "renewal", START + DAY, "completed"),
        (pack, "failed", START + DAY, "failed"),
        (pack, "before", START - DAY, "completed"),
        (pack, "opened the window", START + timedelta(minutes=5), "completed"),
        (None, "nothing", START + DAY, "completed"),
        (host.plan(0), "empty", START + DAY, "completed"),
    ):
        pay(host, user, plan, reference, at=at, status=status)
    with connect() as connection:
        before = dump(host)
        looked = import_payments(connection, mapping, by="ann", dry_run=True)
        assert dump(host) == before
        assert [(one.reference, one.outcome) for one in looked] == [("tx-1", "to_grant"), ("2", "to_grant")]
        for outcome in ("granted", "already"):
            given = import_payments(connection, mapping, by="ann")
            assert [(one.reference, one.tokens, one.outcome) for one in given] == [
                ("tx-1", 500, outcome),
                ("2", 500, outcome),
            ]
        assert read_account(connection, user).original == PLAN + 1_000
        assert import_payments(connection, mapping, by="ann", since=START + 3 * DAY) == []
    assert host.execute("SELECT DISTINCT granted_by, reason FROM trueup.token_grant").one() == (
        "ann",
        "token pack bought",
    )


def test_an_import_reports_references_with_another_or_a_revoked_grant(paying: Any) -> None:
    host, mapping = paying
    user, pack = host.subscriber(PLAN), host.plan(500)
    pay(host, user, pack, "tx-1", at=START + DAY)
    pay(host, user, pack, "tx-2", at=START + DAY)
    with connect() as connection:
        grant_tokens(connection, user, 400, reason="r", reference="tx-1", by="ann")
        second = grant_tokens(connection, user, 500, reason="r", reference="tx-2", by="ann")
        revoke_grant(connection, user, second.id, reason="refund", by="ann")
        outcomes = [one.outcome for one in import_payments(connection, mapping, by="ann")]
    assert outcomes == ["other_figures", "revoked"]


def test_without_mapped_payments_an_import_names_the_setting(host: Host, connection: Connection) -> None:
    with pytest.raises(PaymentsNotMappedError, match=r"host\.payment\.table"):
        import_payments(connection, HostMapping(), by="ann")
