"""Packs that are paid for and in neither plan, grant nor counter: with the journal, without it, and in a preview."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Connection

from tests.support.findings import forget_journal
from tests.support.host import START, Host, host_of, pooled_engine
from tests.support.two_books import DAY, HOUR, MAPPED, Books
from trueup.accounts.payments import import_payments
from trueup.database.engine import transaction
from trueup.host.fields import SubscriptionTable
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install
from trueup.preview.scan import scan
from trueup.reconcile.local_run import reconcile
from trueup.reports.rows import DriftFilter
from trueup.reports.run_report import find_source, read_source, with_host_faults
from trueup.reports.uncredited import UncreditedPacks, uncredited_packs
from trueup.review.decisions import decide_drift, list_reviews

PAID_AT = START + DAY
PACK = 20_000


@pytest.fixture(scope="module")
def template_database(mapped_template: str) -> str:
    return mapped_template


@pytest.fixture(params=["journal", "no journal"])
def books(request: pytest.FixtureRequest, host: Host, connection: Connection) -> Books:
    """A subscriber with a plan of 10,000. The journal, if there is one, is older than the payments."""
    if request.param == "no journal":
        forget_journal(host)
    else:
        host.execute("UPDATE trueup.journal_start SET started_at = :at", at=START)
    return Books(host, connection)


def buy(books: Books, reference: str = "t1", tokens: int = PACK, *, paid_hours: int = 0) -> int:
    """Pay for a pack that the host does not credit. Returns the pack."""
    pack = books.host.plan(tokens)
    books.pay(pack, PAID_AT + paid_hours * HOUR, reference=reference)
    return pack


def credit(books: Books, tokens: int = PACK, *, hours: float = 0) -> None:
    """Raise the counter, at a time after the payment."""
    books.add(tokens)
    books.host.execute(
        "UPDATE trueup.counter_entry SET at = :at WHERE id = (SELECT max(id) FROM trueup.counter_entry)",
        at=PAID_AT + timedelta(hours=hours),
    )


def found(books: Books, mapping: HostMapping = MAPPED) -> UncreditedPacks:
    packs = uncredited_packs(books.connection, mapping, at=PAID_AT + DAY)
    assert packs is not None
    assert (packs.packs, packs.tokens) == (len(packs.newest), sum(pack.tokens for pack in packs.newest))
    return packs


def references(books: Books) -> list[str]:
    return [pack.reference for pack in found(books).newest]


def is_journaled(books: Books) -> bool:
    return books.host.value("SELECT trueup.journal_since() IS NOT NULL") is True


def test_a_pack_in_neither_plan_nor_counter_is_found(books: Books) -> None:
    buy(books)
    books.use(400)
    (pack,) = found(books).newest
    assert (pack.user_id, pack.reference, pack.tokens, pack.paid_at) == (books.user, "t1", PACK, PAID_AT)
    assert pack.certainty == ("proven" if is_journaled(books) else "inferred")


def test_a_pack_in_the_counter_is_not(books: Books) -> None:
    buy(books)
    credit(books)
    books.use(400)
    assert references(books) == []


def test_a_pack_whose_tokens_are_used_up_is_not(books: Books) -> None:
    buy(books)
    credit(books)
    books.use(PACK)
    books.use(9_999)
    assert books.host.counter(books.user) == 1
    assert references(books) == []


def test_a_pack_that_a_stale_write_has_overwritten_is(books: Books) -> None:
    buy(books)
    credit(books)
    books.set(10_000)
    assert [(pack.reference, pack.certainty) for pack in found(books).newest] == [("t1", "inferred")]


def test_a_pack_whose_surplus_a_person_has_taken_away_is_not(books: Books) -> None:
    buy(books)
    credit(books)
    reconcile(books.host.engine, MAPPED)
    (item,) = list_reviews(books.connection, "bigint")
    decide_drift(books.connection, item.id, "accept", by="ann", note="refunded")
    assert books.host.counter(books.user) == 10_000
    assert references(books) == []


def test_a_pack_that_was_credited_with_a_bonus_is_not(books: Books) -> None:
    buy(books)
    credit(books, PACK + 500)
    assert references(books) == []


def test_a_pack_that_became_the_plan_is_not(books: Books) -> None:
    pack = buy(books)
    books.host.execute("UPDATE billing_subscription SET token_plan_id = :pack, tokens_remaining = 20000", pack=pack)
    assert references(books) == []


def test_a_pack_with_a_grant_is_not_whatever_made_it(books: Books) -> None:
    buy(books)
    buy(books, "t2", 5_000)
    assert references(books) == ["t1", "t2"] or references(books) == ["t2", "t1"]
    books.host.execute(
        "SELECT trueup.grant_tokens(:user, 5000, 'given by hand', 'case-7', NULL, 'ann', NULL)", user=books.user
    )
    assert references(books) == ["t1"]
    import_payments(books.connection, MAPPED, by="ann")
    assert references(books) == []


def test_a_payment_of_an_hour_ago_an_open_one_and_one_before_the_period_are_not(books: Books) -> None:
    pack = buy(books, paid_hours=24)
    books.pay(pack, PAID_AT, status="pending", reference="t2")
    books.pay(pack, START - DAY, reference="t3")
    books.pay(pack, START, reference="t4")  # it opened the period
    assert references(books) == []


def test_a_payment_that_the_host_recorded_twice_is_one(books: Books) -> None:
    pack = buy(books)
    books.pay(pack, PAID_AT + HOUR)
    assert references(books) == ["t1"]


def test_of_two_equal_packs_the_journal_tells_the_one_that_was_not_credited(books: Books) -> None:
    if not is_journaled(books):
        pytest.skip("without the journal the counter, which shows one of them, proves nothing")
    pack = buy(books)
    books.pay(pack, PAID_AT + 3 * HOUR, reference="t2")
    credit(books)
    assert references(books) == ["t2"]
    credit(books, hours=3)
    assert references(books) == []


def test_the_report_on_a_run_has_them_and_a_filter_on_causes_leaves_them_out(books: Books) -> None:
    buy(books)
    reconcile(books.host.engine, MAPPED)
    with transaction() as connection:
        for only, expected in (
            (DriftFilter(), PACK),
            (DriftFilter(user_id=books.user), PACK),
            (DriftFilter(user_id=books.user + 1), 0),
            (DriftFilter(min_tokens=1), None),
        ):
            source = find_source(connection, "bigint", only=only)
            assert source is not None
            report = read_source(connection, source)
            report = with_host_faults(connection, MAPPED, source, report, min_age_seconds=0)
            assert (report.uncredited and report.uncredited.tokens) == expected
    assert report.drifted == 0


def test_a_host_whose_subscription_states_its_tokens_or_has_no_payments_is_not_looked_at(books: Books) -> None:
    subscription = SubscriptionTable(tokens_included="tokens_remaining")
    for mapping in (HostMapping(), MAPPED.model_copy(update={"subscription": subscription})):
        assert uncredited_packs(books.connection, mapping, at=PAID_AT) is None


@pytest.fixture
def unattached(empty_database: str) -> Iterator[Host]:
    engine = pooled_engine(empty_database)
    build_host_metadata(MAPPED).create_all(engine)
    engine.dispose()
    with host_of(empty_database) as host:
        yield host


def test_the_preview_finds_them_before_trueup_is_attached(unattached: Host) -> None:
    books = Books(unattached, unattached.connection)
    buy(books)
    books.use(400)
    other = unattached.subscriber(10_000)
    for user, expected in ((None, PACK), (books.user, PACK), (other, 0)):
        outcome = scan(unattached.engine, MAPPED, lambda checked, findings: None, only_user=user)
        assert outcome.uncredited is not None
        assert outcome.uncredited.tokens == expected
    assert outcome.notes == ()


def test_a_counter_that_counts_up_never_has_a_pack(host: Host, connection: Connection) -> None:
    up = SubscriptionTable(counts="up")
    mapping = MAPPED.model_copy(update={"subscription": up})
    with host.engine.begin() as setup:
        install(setup, mapping, with_host_tables=True)
    books = Books(host, connection)
    books.set(0)
    buy(books)
    packs = uncredited_packs(books.connection, mapping, at=PAID_AT + DAY)
    assert packs is not None
    assert [(pack.tokens, pack.certainty) for pack in packs.newest] == [(PACK, "inferred")]
