"""Systemic causes: one fault of the host that is behind many drifts, and a healthy host, which has none."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.support.host import Host, host_of, pooled_engine
from tests.support.sessions import locked
from tests.support.two_books import MAPPED
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import connect, transaction
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.preview.scan import scan
from trueup.reconcile.local_run import reconcile
from trueup.reports.rows import DriftFilter
from trueup.reports.run_report import DriftReport, find_source, read_source, with_host_faults
from trueup.reports.systemic import THRESHOLDS, SystemicCause, sentence_of
from trueup.settings.policies import Rules

RULES = Rules(min_age_seconds=0)
USERS = 4
ENOUGH = THRESHOLDS["decrement_not_run"].count


class Application:
    """A host with a few subscribers that logs calls, and lowers counters as it is told."""

    def __init__(self, host: Host, mapping: HostMapping) -> None:
        self.host = host
        self.mapping = mapping
        self.users = [host.subscriber(1_000_000) for _ in range(USERS)]
        self.describes = True  # the decrement rows

    def named(self, application: str) -> None:
        self.host.execute("SELECT set_config('application_name', :name, false)", name=application)

    def now(self) -> datetime:
        at: datetime = self.host.value("SELECT clock_timestamp()")
        return at

    def log(self, user: int, tokens: int, section: str = "chat") -> None:
        self.host.log(user, tokens, at=self.now(), section=section)

    def call(self, user: int, tokens: int, section: str = "chat") -> None:
        """Log a call, lower the counter, and note that in a decrement row, if the mapping has such rows."""
        self.log(user, tokens, section)
        self.host.decrement(user, tokens)
        self.note(user, tokens, f"AI usage: {section}")

    def note(self, user: int, tokens: int, description: str) -> None:
        if self.mapping.token_usage.table:
            column, value = (", description", ", :description") if self.describes else ("", "")
            self.host.execute(
                f"INSERT INTO billing_tokenusage (subscription_id, used_tokens, usage_date{column}) "
                f"SELECT id, :tokens, clock_timestamp(){value} FROM billing_subscription WHERE user_id = :user",
                tokens=tokens,
                user=user,
                **({"description": description} if self.describes else {}),
            )

    def save(self, user: int, counter: int | None) -> None:
        self.host.execute(
            "UPDATE billing_subscription SET tokens_remaining = :counter WHERE user_id = :user",
            counter=counter,
            user=user,
        )

    def reconcile(self) -> DriftReport:
        reconcile(self.host.engine, self.mapping, rules=RULES)
        return self.report()

    def report(self, **chosen: Any) -> DriftReport:
        with transaction() as connection:
            source = find_source(connection, "bigint", **chosen)
            assert source is not None
            report = read_source(connection, source)
            return with_host_faults(connection, self.mapping, source, report, min_age_seconds=0)


@pytest.fixture(params=[MAPPED, HostMapping()], ids=["decrement rows", "journal alone"])
def mapping(request: pytest.FixtureRequest) -> HostMapping:
    mapping: HostMapping = request.param
    return mapping


@pytest.fixture
def template_database(mapping: HostMapping, plain_template: str, mapped_template: str) -> str:
    return mapped_template if mapping == MAPPED else plain_template


@pytest.fixture
def application(host: Host, mapping: HostMapping) -> Application:
    """An application to which trueup is attached; a run has found its counters right."""
    application = Application(host, mapping)
    application.reconcile()
    return application


@pytest.fixture
def unattached(empty_database: str) -> Iterator[Application]:
    """An application with decrement rows, in whose database nothing is trueup's."""
    engine = pooled_engine(empty_database)
    build_host_metadata(MAPPED).create_all(engine)
    engine.dispose()
    with host_of(empty_database) as host:
        yield Application(host, MAPPED)


def figures(cause: SystemicCause) -> tuple[object, ...]:
    return cause.kind, cause.dimension, cause.name, cause.count, cause.of, cause.users, cause.tokens


def found(report: DriftReport) -> list[tuple[object, ...]]:
    assert report.systemic is not None
    return [figures(cause) for cause in report.systemic]


def only_one(report: DriftReport) -> SystemicCause:
    assert report.systemic is not None
    (cause,) = report.systemic
    return cause


def use_two_features(application: Application) -> datetime:
    """Lower the counter for the chat and, but for two calls, not for the products. Returns when that began."""
    for number in range(ENOUGH):
        application.call(application.users[number % USERS], 100 + number)
    application.call(application.users[0], 5_001, "products")
    began = application.now()
    for number in range(ENOUGH):
        application.log(application.users[number % USERS], 1_000 + number, "products")
    application.call(application.users[1], 5_002, "products")
    return began


NOT_RUN = ("decrement_not_run", "section", "products", ENOUGH, ENOUGH + 1, USERS)
TOKENS = sum(1_000 + number for number in range(ENOUGH))


def test_a_decrement_that_never_runs_for_one_feature_is_one_finding(application: Application) -> None:
    began = use_two_features(application)
    report = application.reconcile()
    assert found(report) == [(*NOT_RUN, TOKENS)]
    assert report.systemic is not None
    assert began <= report.systemic[0].since <= application.now()
    assert sentence_of(report.systemic[0]) == (
        f"The decrement does not run in the section 'products': {ENOUGH} of {ENOUGH + 1} log rows have none, "
        f"{TOKENS:,} tokens of {USERS} users"
    )
    # The next run finds nothing, because the counters are corrected; a report on both tells it still.
    assert found(application.reconcile()) == []
    assert found(application.report(since=began)) == [(*NOT_RUN, TOKENS)]
    # What is corrected does not depend on it.
    assert all(application.host.counter(user) == 1_000_000 - application.host.used(user) for user in application.users)


def test_the_preview_finds_it_before_trueup_is_attached(unattached: Application) -> None:
    use_two_features(unattached)
    outcome = scan(unattached.host.engine, MAPPED, lambda checked, findings: None, rules=RULES)
    assert outcome.systemic is not None
    assert [figures(cause) for cause in outcome.systemic] == [(*NOT_RUN, TOKENS)]


def test_the_preview_says_so_if_it_may_not_read_the_sections(unattached: Application) -> None:
    use_two_features(unattached)
    host = unattached.host
    role = f"reader_{host.engine.url.database}"
    host.execute(f"CREATE ROLE {role} LOGIN")
    try:
        host.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        host.execute(f"REVOKE SELECT ON ai_usage_log FROM {role}")
        host.execute(f"GRANT SELECT (id, user_id, total_tokens, success, created_at) ON ai_usage_log TO {role}")
        engine = create_engine(host.engine.url.set(username=role), poolclass=NullPool)
        checked: list[int] = []
        outcome = scan(engine, MAPPED, lambda counters, findings: checked.append(len(findings)), rules=RULES)
        engine.dispose()
    finally:
        host.execute(f"DROP OWNED BY {role}")
        host.execute(f"DROP ROLE {role}")
    assert (sum(checked), outcome.systemic) == (USERS, None)
    assert outcome.notes == ("Systemic causes were not looked for: permission denied for table ai_usage_log.",)


def test_a_decrement_that_runs_nowhere_is_one_finding_about_the_host(application: Application) -> None:
    for number in range(ENOUGH):
        application.log(application.users[number % USERS], 1_000 + number, f"section {number % 2}")
    assert found(application.reconcile()) == [
        ("decrement_not_run", "host", "", ENOUGH, ENOUGH, USERS, TOKENS),
    ]


def test_a_decrement_that_stopped_is_told_from_then_on(application: Application) -> None:
    for number in range(2 * ENOUGH):
        application.call(application.users[number % USERS], 100 + number)
    stopped = application.now()
    for number in range(ENOUGH):
        application.log(application.users[number % USERS], 1_000 + number)
    report = application.reconcile()
    assert found(report) == [("decrement_not_run", "host", "", ENOUGH, ENOUGH, USERS, TOKENS)]
    assert report.systemic is not None
    assert report.systemic[0].since >= stopped


def test_a_healthy_host_that_misses_a_few_decrements_has_no_systemic_cause(application: Application) -> None:
    for number in range(5 * ENOUGH):
        user = application.users[number % USERS]
        (application.log if number % 10 == 9 else application.call)(user, 100 + number)
    report = application.reconcile()
    assert [cause.cause for cause in report.causes] == ["missed_decrement"]
    assert found(report) == []


def test_a_fault_of_fewer_rows_or_users_is_no_systemic_cause(application: Application) -> None:
    for number in range(ENOUGH - 1):
        application.log(application.users[number % USERS], 1_000 + number)
    assert found(application.reconcile()) == []
    for number in range(ENOUGH):
        application.call(application.users[number % USERS], 500 + number)
    for number in range(2 * ENOUGH):
        application.log(application.users[number % 2], 2_000 + number, "products")
    assert found(application.reconcile()) == []


def test_a_counter_at_zero_that_nothing_is_subtracted_from_is_no_fault(application: Application) -> None:
    for user in application.users:
        application.call(user, 1_000_000)
    for number in range(2 * ENOUGH):
        application.log(application.users[number % USERS], 1_000 + number, "products")
    # One user buys again; the rows from before stay without a decrement, and one is missed after it.
    application.save(application.users[0], 50_000)
    application.log(application.users[0], 77)
    assert found(application.reconcile()) == []


NIGHTLY = "nightly product texts"


def stale_job(application: Application, user: int, *, spent: int, description: str = NIGHTLY) -> None:
    """A job reads the counter, requests lower it, and the job saves what it has read less its own tokens."""
    read = application.host.counter(user)
    assert read is not None
    application.named("web")
    application.call(user, spent)
    application.named("nightly")
    application.log(user, 900, "products")
    application.save(user, read - 900)
    application.note(user, 900, description)


def test_a_stale_job_is_one_finding_with_its_application_name(application: Application) -> None:
    jobs = THRESHOLDS["stale_writer"].count
    application.named("web")
    for number in range(40):
        application.call(application.users[number % USERS], 10 + number)
    began = application.now()
    for number in range(jobs):
        stale_job(application, application.users[number % USERS], spent=200 + number)
    report = application.reconcile()
    lost = sum(200 + number for number in range(jobs))
    assert found(report) == [("stale_writer", "application", "nightly", jobs, jobs, USERS, lost)]
    assert report.systemic is not None
    assert began <= report.systemic[0].since
    described = " ('nightly product texts')" if application.mapping.token_usage.table else ""
    assert sentence_of(report.systemic[0]) == (
        f"The writer in the application 'nightly'{described} saves values that it read before other changes: "
        f"{jobs} of its {jobs} writes overwrote {lost:,} tokens of {USERS} users"
    )
    assert all(application.host.counter(user) == 1_000_000 - application.host.used(user) for user in application.users)


def test_a_stale_writer_among_many_of_one_name_is_told_by_its_section(application: Application) -> None:
    """All of the host's processes have one name, as with a connection pooler."""
    jobs = THRESHOLDS["stale_writer"].count
    application.named = lambda application: None  # type: ignore[method-assign]
    for number in range(jobs):
        stale_job(application, application.users[number % USERS], spent=200 + number)
        application.call(application.users[number % USERS], 50 + number)
    ((kind, dimension, name, stale, writes, *_),) = found(application.reconcile())
    assert (kind, dimension, name, stale, writes) == ("stale_writer", "section", "products", jobs, jobs)


@pytest.mark.parametrize("mapping", [MAPPED], ids=["decrement rows"])
def test_a_stale_writer_that_shares_name_and_section_is_told_by_its_decrement_rows(application: Application) -> None:
    jobs = THRESHOLDS["stale_writer"].count
    application.named = lambda application: None  # type: ignore[method-assign]
    for number in range(jobs):
        user = application.users[number % USERS]
        stale_job(application, user, spent=200 + number)
        application.call(user, 50 + number, "products")
    writer = only_one(application.reconcile())
    assert figures(writer)[:5] == ("stale_writer", "description", NIGHTLY, jobs, jobs)
    assert sentence_of(writer).startswith("The writer of the decrements 'nightly product texts' saves values")


@pytest.mark.parametrize("mapping", [MAPPED], ids=["decrement rows"])
def test_a_host_without_descriptions_has_its_stale_writers_by_application(application: Application) -> None:
    """The mapping names the column by default, and the subscriptions have one of that name."""
    application.host.execute("ALTER TABLE billing_tokenusage DROP COLUMN description")
    application.host.execute("ALTER TABLE billing_subscription ADD COLUMN description text DEFAULT 'of a subscription'")
    application.describes = False
    jobs = THRESHOLDS["stale_writer"].count
    for number in range(jobs):
        stale_job(application, application.users[number % USERS], spent=200 + number)
    writer = only_one(application.reconcile())
    assert (writer.dimension, writer.name, writer.descriptions) == ("application", "nightly", ())


def test_requests_that_seldom_meet_are_no_stale_writer(application: Application) -> None:
    jobs = THRESHOLDS["stale_writer"].count
    for number in range(jobs):
        stale_job(application, application.users[number % USERS], spent=200 + number, description="AI usage: products")
        application.named("nightly")
        for more in range(4):
            application.call(application.users[number % USERS], 10 * number + more + 1_000, "products")
    report = application.reconcile()
    assert "stale_write" in {cause.cause for cause in report.causes}
    assert found(report) == []


def test_a_stale_write_that_waits_for_a_person_is_counted_once(application: Application) -> None:
    jobs = THRESHOLDS["stale_writer"].count
    rules = Rules(min_age_seconds=0, policies={"stale_write": "review"})
    for number in range(jobs - 1):
        stale_job(application, application.users[number % USERS], spent=200 + number)
    for number in range(3):
        application.named("web")
        for user in application.users:
            application.call(user, 10 + number)
        application.log(application.users[number], 33)
        reconcile(application.host.engine, application.mapping, rules=rules)
    stored = "SELECT count(*) FROM trueup.drift WHERE cause LIKE '%stale_write%'"
    assert application.host.value(stored) > USERS
    assert found(application.report(since=application.host.value("SELECT now() - interval '1 day'"))) == []


def test_a_report_about_some_drifts_looks_for_no_systemic_cause(application: Application) -> None:
    use_two_features(application)
    application.reconcile()
    for only in (DriftFilter(min_tokens=1), DriftFilter(causes=("missed_decrement",)), DriftFilter(user_id=1)):
        assert application.report(only=only).systemic is None
    content = json.loads(json.dumps(application.report().as_json()))
    assert content["systemic"][0]["name"] == "products"
    assert content["systemic"][0]["since"] > "2024"


def test_a_section_whose_writes_are_all_stale_has_a_stale_writer_and_no_decrement_that_does_not_run(
    application: Application,
) -> None:
    for number in range(2 * ENOUGH):
        stale_job(application, application.users[number % USERS], spent=200 + number)
    for user in application.users:
        application.log(user, 33)
    assert [cause[:3] for cause in found(application.reconcile())] == [("stale_writer", "application", "nightly")]


def test_requests_of_any_size_do_not_hide_a_decrement_that_does_not_run(application: Application) -> None:
    """Sums of other requests' decrements have the sizes of the log rows."""
    for number in range(ENOUGH):
        for tokens in (50, 51):
            application.call(application.users[number % USERS], tokens)
        application.log(application.users[number % USERS], 101, "products")
    assert found(application.reconcile()) == [
        ("decrement_not_run", "section", "products", ENOUGH, ENOUGH, USERS, 101 * ENOUGH)
    ]


def test_a_log_that_is_too_large_for_the_statement_timeout_is_left_out_with_a_warning(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    use_two_features(application)
    application.reconcile()
    with transaction() as connection:
        source = find_source(connection, "bigint")
        assert source is not None
        report = read_source(connection, source)
        # The statement waits for this lock, as it would work on a large table.
        with locked(application.host, "LOCK TABLE ai_usage_log IN ACCESS EXCLUSIVE MODE"):
            connection.execute(text("SET LOCAL statement_timeout = '200ms'"))
            report = with_host_faults(connection, application.mapping, source, report, min_age_seconds=0)
    assert (report.systemic, report.drifted) == (None, USERS)
    assert "leaves out systemic causes" in caplog.text


def test_calls_that_trueup_has_charged_need_no_decrement_of_the_host(application: Application) -> None:
    with connect() as connection:
        for number in range(2 * ENOUGH):
            charge_tokens(connection, hold_tokens(connection, application.users[number % USERS], 500), 300 + number)
    for user in application.users:
        application.log(user, 33)
    report = application.reconcile()
    assert [cause.cause for cause in report.causes] == ["missed_decrement"]
    assert found(report) == []
