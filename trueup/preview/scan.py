"""Compare every counter with the usage log, as a role that may only read. Writes nothing.

It needs no schema of trueup's and takes only a reader's locks. Users are read in pages by their ids; each page is one
read-only transaction with one snapshot, in which one statement sums the log and another gathers the evidence. So it
works on a hot standby too. The statements share their SQL with the functions that a reconcile run calls. If trueup is
not set up, they read its tables as empty.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from psycopg.errors import InsufficientPrivilege, QueryCanceled, UndefinedColumn
from sqlalchemy import Connection, Engine, TextClause, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from trueup.accounts.user_ids import UserId
from trueup.database.driver_errors import DEADLOCK_OR_CONFLICT
from trueup.database.engine import translated_errors
from trueup.database.schema import SCHEMA, build_metadata
from trueup.drift.action import DEFAULT_RULES, Verdict, decide
from trueup.drift.causes import Explanation
from trueup.drift.detect import Drift
from trueup.drift.evidence import Evidence
from trueup.drift.explain import explain
from trueup.drift.known_drifts import Past, read_past
from trueup.errors import TrueupError
from trueup.host.mapping import HostMapping, UserIdType
from trueup.host.sql import INSTALLED, UNCOUNTABLE, OwnTables, fields_read, render_statement
from trueup.preview.checks import (
    Named,
    check_columns,
    check_expressions,
    is_attached,
    missing_index,
    named_columns,
    optional_tables,
)
from trueup.reconcile.audit import UNCOUNTABLE_REMEDY
from trueup.reconcile.runs import Finding
from trueup.reconcile.shards import MAX_FAILURES, bounds, conditions_of
from trueup.reports.systemic import SystemicCause, systemic_causes
from trueup.reports.uncredited import UncreditedPacks, uncredited_packs
from trueup.settings.policies import Rules

PAGE_SIZE = 5_000
"""Subscriptions that one transaction compares; the process keeps only their drifts in memory."""

# The cost of evidence grows faster than the number of users in one statement.
EXPLAINED_AT_ONCE = 100
# Causes that the counter shows by itself, without any evidence.
_PLAIN = frozenset({"counter_null", "counter_negative", "plan_negative", "counter_out_of_range", "burned_at_expiry"})

Report = Callable[[int, Sequence[Finding]], None]
"""Called after each batch with the number of counters compared, and the drifts found."""


@dataclass(kw_only=True)
class ScanOutcome:
    """The outcome of a scan. Times are the database's; None: not yet. `notes`: what the scan could not do, and why.

    `systemic`: the systemic causes of the present periods. `uncredited`: the packs that are paid for and not credited.
    Both None: not looked for.
    """

    started_at: datetime | None = None
    finished_at: datetime | None = None
    notes: tuple[str, ...] = ()
    systemic: list[SystemicCause] | None = None
    uncredited: UncreditedPacks | None = None


def scan(
    engine: Engine,
    mapping: HostMapping,
    report: Report,
    *,
    rules: Rules = DEFAULT_RULES,
    only_user: UserId | None = None,
    page_size: int = PAGE_SIZE,
    timeout_seconds: int = 30,
    scan_timeout_seconds: int = 600,
) -> ScanOutcome:
    """Compare every counter with the log, and report each drift with its cause as a reconcile run would.

    If trueup is set up, its grants and decisions count. `only_user` None: all users. `timeout_seconds`: the limit of a
    statement; a page that reaches it is retried as smaller ones. `scan_timeout_seconds`: the limit of the one statement
    that reads the whole log if it has no index by user; then no causes are named. Raises `TrueupError` that names the
    missing table, column or right.
    """
    with translated_errors():
        running = _Scan(engine, mapping, report, rules, timeout_seconds)
        running.prepare()
        if running.index is None or only_user is not None:
            running.by_pages(only_user, page_size)
            running.look_for_host_faults(only_user, scan_timeout_seconds)
        else:
            running.at_once(scan_timeout_seconds)
        return running.outcome


@dataclass
class _Scan:
    """A running scan, and the values that all its batches share, which `prepare` reads.

    `index`: the statement that creates a missing index; without the index no causes are named. `missed`: the users
    whose counters missed decrements.
    """

    engine: Engine
    mapping: HostMapping
    report: Report
    rules: Rules
    timeout_seconds: int
    outcome: ScanOutcome = field(default_factory=ScanOutcome)
    missed: list[UserId] = field(default_factory=list)
    plan_sizes: frozenset[int] = field(init=False)
    counter_limit: int = field(init=False)
    attached: bool = field(init=False)
    statements: "_Statements" = field(init=False)
    index: str | None = field(init=False)

    def prepare(self) -> None:
        """Check tables, columns and rights, and read the values that all batches share."""
        with self._reading(self.timeout_seconds) as connection:
            check_columns(connection, _needed_columns(self.mapping), self.mapping.user_id_type)
            check_expressions(connection, self.mapping)
            self.attached = is_attached(connection, self.mapping)
            self.index = missing_index(connection, self.mapping)
            self.statements = _Statements(self.mapping, attached=self.attached)
            self.plan_sizes = frozenset(connection.scalars(self.statements.plan_sizes))
            self.counter_limit = connection.scalar(self.statements.counter_limit) or 0
            self.outcome.started_at = connection.scalar(text("SELECT statement_timestamp()"))
            left_out = optional_tables(connection, self.mapping)
        if left_out:
            note = f"{' and '.join(left_out)}: not mapped. With decrement rows and payments more causes are named. "
            self.outcome.notes += (f"{note}`trueup db discover` proposes the settings.",)
        if self.index is not None:
            note = (
                "Causes were not looked for: without an index each user would need a scan of a whole table. Create the "
                f"index: {self.index};"
            )
            self.outcome.notes += (note,)

    def by_pages(self, only_user: UserId | None, page_size: int) -> None:
        """Read the users in pages, in the order of their ids; retry a page that takes too long as smaller ones."""
        after: UserId | None = None
        size, failures = page_size, 0
        while True:
            try:
                last, counters, findings = self._page(after, only_user, size)
            except DBAPIError as error:
                failures += 1
                slow = isinstance(error.orig, QueryCanceled)
                if slow and size > 1:
                    size = max(1, size // 10)
                elif slow:
                    raise TrueupError(
                        f"Reading one user's rows took longer than {self.timeout_seconds} s. The report is not "
                        "complete. Raise TRUEUP_STATEMENT_TIMEOUT_SECONDS and run it again."
                    ) from error
                elif not isinstance(error.orig, DEADLOCK_OR_CONFLICT) or failures >= MAX_FAILURES:
                    raise
                continue
            self.report(counters, findings)
            if last is None or only_user is not None or counters < size:
                return
            # The next users may have fewer rows, so the page grows again.
            after, failures, size = last, 0, min(page_size, 2 * size)

    def look_for_host_faults(self, only_user: UserId | None, timeout_seconds: int) -> None:
        """Look for packs that were never credited and, for all users, for faults behind many of the drifts."""
        began = self.outcome.started_at
        assert began is not None  # noqa: S101 - for the type checker: prepare() has read it
        own, mapping = self.statements.own, self.mapping
        if mapping.payment.table is not None:
            with self._noted("Packs that were never credited", timeout_seconds) as connection:
                self.outcome.uncredited = uncredited_packs(connection, mapping, at=began, only_user=only_user, own=own)
        # Only decrement rows or the journal tell whether a decrement ran.
        if only_user is not None or not (self.attached or mapping.token_usage.table):
            return
        if not self.missed:
            self.outcome.systemic = []
            return
        until = began - timedelta(seconds=self.rules.min_age_seconds)
        since = datetime.min.replace(tzinfo=UTC)
        with self._noted("Systemic causes", timeout_seconds) as connection:
            self.outcome.systemic = systemic_causes(
                connection, mapping, since=since, until=until, drifted=self.missed, own=own
            )

    @contextmanager
    def _noted(self, what: str, timeout_seconds: int) -> Iterator[Connection]:
        """Yield a connection for reading. What takes too long or may not be read becomes a note."""
        try:
            with self._reading(timeout_seconds) as connection:
                yield connection
        except DBAPIError as error:
            if not isinstance(error.orig, QueryCanceled | InsufficientPrivilege | UndefinedColumn):
                raise
            why = str(error.orig).partition("\n")[0]
            self.outcome.notes += (f"{what} were not looked for: {why}.",)

    def at_once(self, timeout_seconds: int) -> None:
        """Read the whole log once: without an index, each page would read it."""
        with self._reading(timeout_seconds) as connection:
            counted = connection.execute(self.statements.page(None, None), {"page": None}).one()
            self._refuse_shared_users(counted)
            rows = connection.execution_options(yield_per=EXPLAINED_AT_ONCE).execute(
                self.statements.drifted(None, None, None), {"at": counted.at}
            )
            for part in rows.partitions():
                drifts = self._countable([Drift(seen_at=counted.at, **row._mapping) for row in part])
                self.report(0, [self._finding(drift, Past()) for drift in drifts])
            self.outcome.finished_at = counted.at
        self.report(counted.counters, [])

    def _page(
        self, after: UserId | None, only_user: UserId | None, size: int
    ) -> tuple[UserId | None, int, list[Finding]]:
        """Return the last user of the page after `after` (None: no user is left), its counters, and their drifts."""
        with self._reading(self.timeout_seconds) as connection:
            who = {} if only_user is None else {"only_user": only_user}
            page = connection.execute(
                self.statements.page(after, only_user), {"page": size, **bounds(after, None), **who}
            ).one()
            self.outcome.finished_at = page.at
            if not page.counters:
                return None, 0, []
            self._refuse_shared_users(page)
            values = {"at": page.at, **bounds(after, page.last), **who}
            rows = connection.execute(self.statements.drifted(after, page.last, only_user), values)
            drifts = self._countable([Drift(seen_at=page.at, **row._mapping) for row in rows])
            findings = []
            for start in range(0, len(drifts), EXPLAINED_AT_ONCE):
                findings += self._explained(connection, drifts[start : start + EXPLAINED_AT_ONCE])
            return page.last, page.counters, findings

    def _countable(self, drifts: list[Drift]) -> list[Drift]:
        """Return the drifts of users whose usage can be counted, and note the others."""
        for drift in drifts:
            if drift.consumed == UNCOUNTABLE:
                self.outcome.notes += (f"User {drift.user_id} was set aside. {UNCOUNTABLE_REMEDY}",)
        return [drift for drift in drifts if drift.consumed != UNCOUNTABLE]

    def _refuse_shared_users(self, page: Any) -> None:
        if page.users != page.counters:
            names = self.mapping.subscription
            raise TrueupError(
                f"{names.table}.{names.user_id}: of {page.counters} subscriptions, {page.counters - page.users} belong "
                "to users who have another one, so trueup can't tell which counter is the user's. Map a table with one "
                "row per user."
            )

    def _explained(self, connection: Connection, drifts: Sequence[Drift]) -> list[Finding]:
        """Return the findings of a few drifts, with evidence from the same snapshot."""
        past: dict[UserId, Past] = {}
        evidence: dict[UserId, Evidence] = {}
        if self.attached:
            past = read_past(connection, [drift.user_id for drift in drifts], self.mapping.user_id_type)
        if self.index is None:
            values = {
                "users": [drift.user_id for drift in drifts],
                "subscriptions": [drift.subscription_id for drift in drifts],
                "windows": [drift.window for drift in drifts],
                "original": [drift.original for drift in drifts],
                "consumed": [drift.consumed for drift in drifts],
                "observed": [drift.observed for drift in drifts],
                "at": drifts[0].seen_at,
                "min_age": self.rules.min_age_seconds,
            }
            rows = connection.execute(self.statements.evidence, values)
            evidence = {row.user_id: Evidence.model_validate(row.evidence) for row in rows}
        return [
            self._finding(
                replace(drift, evidence=evidence.get(drift.user_id, drift.evidence)), past.get(drift.user_id, Past())
            )
            for drift in drifts
        ]

    def _finding(self, drift: Drift, past: Past) -> Finding:
        """Return the finding that a reconcile run would record."""
        limit = self.counter_limit
        explanation = explain(drift, plan_sizes=self.plan_sizes, counter_limit=limit, now=drift.seen_at)
        if "missed_decrement" in {part.cause for part in explanation.components}:
            self.missed.append(drift.user_id)
        history = past.history(drift, now=drift.seen_at, min_age_seconds=self.rules.min_age_seconds)
        verdict = decide(drift, explanation, rules=self.rules, history=history, counter_limit=limit)
        if self.index is not None and not {part.cause for part in explanation.components} & _PLAIN:
            explanation = Explanation(evidence={"note": "its rows were not read"})
            verdict = Verdict(policy="report", reason="causes were not looked for")
        return Finding(
            drift=drift, explanation=explanation, verdict=verdict, action=verdict.action, written=None, is_new=True
        )

    @contextmanager
    def _reading(self, timeout_seconds: int) -> Iterator[Connection]:
        """Yield a connection in a read-only transaction with one snapshot for all its statements."""
        with self.engine.begin() as connection:
            connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
            # Fail instead of leaving out rows that a policy hides.
            connection.execute(text("SET LOCAL row_security = off"))
            # Compiling such a large statement takes longer than running it.
            connection.execute(text("SET LOCAL jit = off"))
            connection.execute(text(f"SET LOCAL statement_timeout = '{timeout_seconds}s'"))
            yield connection


_PAGE = """
    SELECT count(*) AS counters, count(DISTINCT p.user_id) AS users,
           (array_agg(p.user_id ORDER BY p.user_id DESC))[1] AS last, statement_timestamp() AS at
    FROM (SELECT s.{{ subscription.user_id }} AS user_id FROM {{ subscription }} s
          WHERE s.{{ subscription.user_id }} IS NOT NULL{{ within("s." ~ subscription.user_id) }}
          ORDER BY s.{{ subscription.user_id }} LIMIT CAST(:page AS bigint)) p
"""
# By subscription, so that each sum is of its own period. `window` is text: Python can't hold every time.
_DRIFTED = """
    {% from "accounts/entitlements.sql" import entitlements %}
    {% from "host/rows.sql" import right_counter, used_in_windows %}
    SELECT e.user_id, e.subscription_id, coalesce(e.is_active, false) AS is_active, e.end_date, e.original,
           e.counter AS observed,
           CAST(e.window_start AS text) AS window, coalesce(u.tokens, 0) AS consumed,
           {{ right_counter("e.original", "coalesce(u.tokens, 0)") }} AS expected, e.plan_kind,
           {{ subscription.counts_up | lower }} AS counts_up
    FROM ({{ entitlements("CAST(:at AS timestamptz)") }}) e
    LEFT JOIN (
        {{ used_in_windows("w." ~ subscription.id, within("l." ~ usage_log.user_id), "CAST(:at AS timestamptz)") }}
    ) u ON CAST(u.key AS text) = e.subscription_id
    WHERE e.user_id IS NOT NULL{{ within("e.user_id") }}
      AND e.plan_kind IS DISTINCT FROM 'unlimited'
      AND (e.counter IS DISTINCT FROM {{ right_counter("e.original", "coalesce(u.tokens, 0)") }}
           OR u.tokens = {{ uncountable }})
"""
_EVIDENCE = """
    {% from "drift/evidence_query.sql" import evidence %}
    WITH wanted AS (
        SELECT * FROM unnest(
            CAST(:users AS {{ user_id_type }}[]), CAST(:subscriptions AS text[]), CAST(:windows AS timestamptz[]),
            CAST(:original AS bigint[]), CAST(:consumed AS bigint[]), CAST(:observed AS bigint[]))
            AS w (user_id, subscription_id, window_start, original, consumed, observed)
    ), {{ evidence("CAST(:at AS timestamptz)", "make_interval(secs => :min_age)") }}
"""
_PLAN_SIZES = '{% from "drift/host_records.sql" import plan_sizes %}{{ plan_sizes() }}'
_COUNTER_LIMIT = '{% from "drift/host_records.sql" import counter_limit %}{{ counter_limit() }}'


@dataclass(frozen=True)
class _EmptyTables(OwnTables):
    """trueup's tables in a database without them: each is a subquery with its columns and no rows."""

    user_id_type: UserIdType
    installed = False

    def __getattr__(self, name: str) -> str:
        return _empty_table(name, self.user_id_type)


@lru_cache
def _empty_table(name: str, user_id_type: UserIdType) -> str:
    found = build_metadata(user_id_type).tables.get(f"{SCHEMA}.{name}")
    if found is None:
        raise AttributeError(name)
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    columns = (f"CAST(NULL AS {column.type.compile(dialect=dialect)}) AS {column.name}" for column in found.columns)
    return f"(SELECT {', '.join(columns)} WHERE false)"


class _Statements:
    """The statements for a mapping. `attached`: trueup is set up, so its grants and decisions count."""

    def __init__(self, mapping: HostMapping, *, attached: bool) -> None:
        self._mapping = mapping
        self.own = INSTALLED if attached else _EmptyTables(mapping.user_id_type)
        self.plan_sizes = self._render(_PLAN_SIZES)
        self.counter_limit = self._render(_COUNTER_LIMIT)
        self.evidence = self._render(_EVIDENCE)

    def page(self, after: UserId | None, only_user: UserId | None) -> TextClause:
        """Count the next users in the order of their ids, at most `:page`, and return the last one."""
        return self._render(_PAGE, within=_within(after, None, only_user))

    def drifted(self, after: UserId | None, last: UserId | None, only_user: UserId | None) -> TextClause:
        """Return the users of a range whose counters differ from the log."""
        return self._render(_DRIFTED, within=_within(after, last, only_user))

    def _render(self, template: str, **values: object) -> TextClause:
        return render_statement(template, self._mapping, self.own, **values)


def _needed_columns(mapping: HostMapping) -> list[Named]:
    """Return the host's columns that a scan reads."""
    templates = [_PAGE, _DRIFTED, _EVIDENCE, _PLAN_SIZES, _COUNTER_LIMIT]
    values = {"within": _within(None, None, None)}
    return named_columns(fields_read(templates, mapping, _EmptyTables(mapping.user_id_type), **values), mapping)


def _within(after: UserId | None, last: UserId | None, only_user: UserId | None) -> Callable[[str], str]:
    """Return the function that adds the range of users to a statement as a condition on a column."""
    conditions = conditions_of(after, last)
    if only_user is None:
        return conditions
    return lambda column: f"{conditions(column)} AND {column} = :only_user"
