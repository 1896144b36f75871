"""The host's faults in every format of `trueup drift report`: systemic causes, and packs that were never credited."""

import re
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup, trueup_json
from tests.support.host import Host
from tests.support.schemas import complaints
from trueup.host.fields import PaymentTable
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.reports.systemic import THRESHOLDS

SCHEMA = "drift-report.schema.json"
SECTION = "products <b>|*x*"
REFERENCE = "tx <i>|`1`"
ROWS = THRESHOLDS["decrement_not_run"].count
DAY = timedelta(days=1)


@pytest.fixture
def faulty(empty_database: str, settings: Callable[..., None]) -> Iterator[Host]:
    """A host that never lowers counters for one section, and has not credited a pack, since a run."""
    settings(TRUEUP_HOST__PAYMENT__TABLE="billing_payment", TRUEUP_RECONCILE__MIN_AGE_SECONDS="0")
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        install(connection, HostMapping(payment=PaymentTable(table="billing_payment")), with_host_tables=True)
    with Host(engine) as host:
        now = host.value("SELECT clock_timestamp()")
        users = [host.subscriber(100_000, start=now - 9 * DAY) for _ in range(3)]
        trueup("reconcile")
        for number in range(ROWS):
            at = host.value("SELECT clock_timestamp()")
            host.log(users[number % 3], 100 + number, at=at, section=SECTION)
        for number in range(ROWS):
            at = host.value("SELECT clock_timestamp()")
            host.log(users[number % 3], 50 + number, at=at)
            host.decrement(users[number % 3], 50 + number)
        host.execute(
            "INSERT INTO billing_payment (user_id, token_plan_id, status, payment_date, transaction_id) "
            "VALUES (:user, :pack, 'completed', :at, :reference)",
            user=users[0], pack=host.plan(7_000), at=now - DAY, reference=REFERENCE,
        )  # fmt: skip
        yield host
    engine.dispose()


TOKENS = sum(100 + number for number in range(ROWS))


def test_the_table_tells_the_faults_above_the_drifts(faulty: Host) -> None:
    trueup("reconcile")
    shown = trueup("drift", "report").stdout
    sentence = (
        f"The decrement does not run in the section {SECTION!r}: {ROWS} of {ROWS} log rows have none, "
        f"{TOKENS:,} tokens of 3 users, since "
    )
    assert shown.index("Systemic causes") < shown.index(sentence) < shown.index("missed decrement")
    assert "1 pack, 7,000 tokens. Credit them with `trueup tokens import-payments`, or refund them." in shown
    (row,) = [line for line in shown.splitlines() if REFERENCE in line]
    assert [cell.strip() for cell in row.split("│")[2:4]] == [REFERENCE, "7,000"]


def test_json_has_them_by_its_schema_after_a_run_and_later(faulty: Host) -> None:
    dry = trueup_json("reconcile", "--dry-run")
    run = trueup_json("reconcile")
    report = trueup_json("drift", "report")
    preview = trueup_json("drift", "report", "--read-only")
    for content in (dry, preview, run, report):
        assert complaints(content, SCHEMA) == []
    assert (dry["systemic"], dry["uncredited"]) == (None, None)
    assert run == report
    (cause,) = report["systemic"]
    assert (cause["kind"], cause["dimension"], cause["name"]) == ("decrement_not_run", "section", SECTION)
    assert (cause["count"], cause["of"], cause["users"], cause["tokens"]) == (ROWS, ROWS, 3, TOKENS)
    assert report["uncredited"]["newest"][0]["reference"] == REFERENCE
    # The counters are right now, and the pack is still missing.
    assert (preview["systemic"], preview["uncredited"]) == ([], report["uncredited"])
    filtered = trueup_json("drift", "report", "--cause", "missed_decrement")
    assert (filtered["systemic"], filtered["uncredited"]) == (None, None)


def test_markdown_and_html_hold_any_text_of_the_host(faulty: Host) -> None:
    trueup("reconcile")
    markdown = trueup("drift", "report", "--format", "markdown").stdout
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", markdown)
    assert "## Systemic causes" in markdown
    assert "## Paid, but in neither plan, grant nor counter" in markdown
    for live in ("<b>", "*x*", "<i>"):
        assert live in markdown
        assert live not in outside
    page = trueup("drift", "report", "--format", "html").stdout
    assert "Systemic causes</h2>" in page
    assert "<b>|*x*" not in page
    assert "&lt;b&gt;|*x*" in page
    assert "tx &lt;i&gt;|" in page
    assert page.index("The decrement does not run") < page.index('id="rows"')
