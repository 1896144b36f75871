"""Every counter compared with the usage log by a role that may only read. Nothing is written anywhere.

No schema of ours is needed, no lock is taken but the reader's own, and no transaction is long: users go through in
batches by their ids, each a read-only transaction with one snapshot, in which one statement sums the log and another
gathers what the host's rows say of the drifts. That works on a hot standby as well.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from psycopg.errors import QueryCanceled
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from trueup.accounts.user_ids import UserId
from trueup.database.driver_errors import DEADLOCK_OR_CONFLICT
from trueup.database.engine import translated_errors
from trueup.drift.action import DEFAULT_RULES, Verdict, decide
from trueup.drift.causes import Explanation
from trueup.drift.detect import Drift
from trueup.drift.evidence import Evidence
from trueup.drift.explain import explain
from trueup.drift.known_drifts import Past, read_past
from trueup.errors import TrueupError
from trueup.host.mapping import HostMapping
from trueup.host.sql import UNCOUNTABLE
from trueup.preview.checks import check_columns, check_expressions, is_attached, missing_index
from trueup.preview.statements import Statements, needed_columns
from trueup.reconcile.audit import UNCOUNTABLE_REMEDY
from trueup.reconcile.runs import Finding
from trueup.reconcile.shards import MAX_FAILURES, bounds
from trueup.settings.policies import Rules

PAGE_SIZE = 5_000
"""How many subscriptions one transaction compares: what a process keeps in memory of them are the drifts."""

# What evidence costs grows faster than the users asked for at once.
EXPLAINED_AT_ONCE = 100
# What a counter shows by itself, without a look at any row.
_PLAIN = frozenset({"counter_null", "counter_negative", "counter_out_of_range", "burned_at_expiry"})

Report = Callable[[int, Sequence[Finding]], None]
"""Called after each batch with how many counters it compared, and what drifts."""


@dataclass(kw_only=True)
class ScanOutcome:
    """How a look went. `notes`: what it could not tell, with the remedy. Times are the database's; None: not yet."""

    started_at: datetime | None = None
    finished_at: datetime | None = None
    notes: tuple[str, ...] = ()


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
    """Compare every counter with the log, and tell of each drift with its cause, as a run of reconcile would.

    Where trueup is set up already, its grants and decisions count. `only_user` None: all. `timeout_seconds`: limit of
    a statement; pages become smaller where it is reached. `scan_timeout_seconds`: of one that reads the whole log,
    where that has no index by user; then no rows are looked at for causes. Raises `TrueupError` saying what is missing:
    a table, a column, a right.
    """
    with translated_errors():
        running = _Scan(engine, mapping, report, rules, timeout_seconds)
        running.prepare()
        if running.index is None or only_user is not None:
            running.by_pages(only_user, page_size)
        else:
            running.at_once(scan_timeout_seconds)
        return running.told


class _Scan:
    """A look, and what all its batches share."""

    plan_sizes: frozenset[int]
    counter_limit: int
    attached: bool
    statements: Statements
    index: str | None
    """The index that is missing; without it causes are not looked for."""

    def __init__(
        self, engine: Engine, mapping: HostMapping, report: Report, rules: Rules, timeout_seconds: int
    ) -> None:
        self.engine = engine
        self.mapping = mapping
        self.report = report
        self.rules = rules
        self.timeout_seconds = timeout_seconds
        self.told = ScanOutcome()

    def prepare(self) -> None:
        """Check what can be checked, and read what is the same for all batches."""
        with self._reading(self.timeout_seconds) as connection:
            check_columns(connection, needed_columns(self.mapping), self.mapping.user_id_type)
            check_expressions(connection, self.mapping)
            self.attached = is_attached(connection, self.mapping)
            self.index = missing_index(connection, self.mapping)
            self.statements = Statements(self.mapping, attached=self.attached)
            self.plan_sizes = frozenset(connection.scalars(self.statements.plan_sizes))
            self.counter_limit = connection.scalar(self.statements.counter_limit) or 0
            self.told.started_at = connection.scalar(text("SELECT statement_timestamp()"))
        if self.index is not None:
            note = (
                f"Causes were not looked for: it would read a whole table for each user. Make the index: {self.index};"
            )
            self.told.notes = (note,)

    def by_pages(self, only_user: UserId | None, page_size: int) -> None:
        """Go through the users in order of their ids; a page that takes too long is tried again as a smaller one."""
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
                        f"One user's rows took longer than {self.timeout_seconds} s to read. "
                        "Raise TRUEUP_STATEMENT_TIMEOUT_SECONDS, and look again."
                    ) from error
                elif not isinstance(error.orig, DEADLOCK_OR_CONFLICT) or failures >= MAX_FAILURES:
                    raise
                continue
            self.report(counters, findings)
            if last is None or only_user is not None or counters < size:
                return
            # What was too much for a time limit once need not be so for those who come after.
            after, failures, size = last, 0, min(page_size, 2 * size)

    def at_once(self, timeout_seconds: int) -> None:
        """Read the whole log once: without an index, each page would."""
        with self._reading(timeout_seconds) as connection:
            counted = connection.execute(self.statements.page(None, None), {"page": None}).one()
            self._refuse_doubles(counted)
            rows = connection.execution_options(yield_per=EXPLAINED_AT_ONCE).execute(
                self.statements.drifted(None, None, None), {"at": counted.at}
            )
            for part in rows.partitions():
                drifts = self._countable([_drift(row, counted.at) for row in part])
                self.report(0, [self._finding(drift, Past()) for drift in drifts])
            self.told.finished_at = counted.at
        self.report(counted.counters, [])

    def _page(
        self, after: UserId | None, only_user: UserId | None, size: int
    ) -> tuple[UserId | None, int, list[Finding]]:
        """Return the last user of the page after that one (None: there is none), how many it has, and what drifts."""
        with self._reading(self.timeout_seconds) as connection:
            who = {} if only_user is None else {"only_user": only_user}
            page = connection.execute(
                self.statements.page(after, only_user), {"page": size, **bounds(after, None), **who}
            ).one()
            self.told.finished_at = page.at
            if not page.counters:
                return None, 0, []
            self._refuse_doubles(page)
            values = {"at": page.at, **bounds(after, page.last), **who}
            statement = self.statements.drifted(after, page.last, only_user)
            drifts = self._countable([_drift(row, page.at) for row in connection.execute(statement, values)])
            findings = []
            for start in range(0, len(drifts), EXPLAINED_AT_ONCE):
                findings += self._explained(connection, drifts[start : start + EXPLAINED_AT_ONCE])
            return page.last, page.counters, findings

    def _countable(self, drifts: list[Drift]) -> list[Drift]:
        """Return the drifts of users whose usage can be counted, and note the others."""
        for drift in drifts:
            if drift.consumed == UNCOUNTABLE:
                self.told.notes += (f"User {drift.user_id} was set aside. {UNCOUNTABLE_REMEDY}",)
        return [drift for drift in drifts if drift.consumed != UNCOUNTABLE]

    def _refuse_doubles(self, page: Any) -> None:
        if page.users != page.counters:
            names = self.mapping.subscription
            raise TrueupError(
                f"{names.table}.{names.user_id}: {page.counters - page.users} of {page.counters} subscriptions are a "
                "user's second, so that no counter is the user's. Map a table with one row a user."
            )

    def _explained(self, connection: Connection, drifts: Sequence[Drift]) -> list[Finding]:
        """Return the findings of a few drifts, with what the host's rows say of them in the same snapshot."""
        past: dict[UserId, Past] = {}
        evidence: dict[UserId, Any] = {}
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
            self._finding(_with(drift, evidence.get(drift.user_id)), past.get(drift.user_id, Past()))
            for drift in drifts
        ]

    def _finding(self, drift: Drift, past: Past) -> Finding:
        """Return what a run of reconcile would find, and leave."""
        limit = self.counter_limit
        explanation = explain(drift, plan_sizes=self.plan_sizes, counter_limit=limit, now=drift.seen_at)
        history = past.history(drift, now=drift.seen_at, min_age_seconds=self.rules.min_age_seconds)
        verdict = decide(drift, explanation, rules=self.rules, history=history, counter_limit=limit)
        if self.index is not None and not {part.cause for part in explanation.components} & _PLAIN:
            explanation = Explanation(evidence={"note": "its rows were not looked at"})
            verdict = Verdict(policy="report", reason="causes were not looked for")
        return Finding(
            drift=drift, explanation=explanation, verdict=verdict, action=verdict.action, written=None, is_new=True
        )

    @contextmanager
    def _reading(self, timeout_seconds: int) -> Iterator[Connection]:
        """Give a connection in a transaction that can't write, with one snapshot for all its statements."""
        with self.engine.begin() as connection:
            connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
            # Refuse rather than leave rows out.
            connection.execute(text("SET LOCAL row_security = off"))
            # Compiling so large a statement takes longer than it does.
            connection.execute(text("SET LOCAL jit = off"))
            connection.execute(text(f"SET LOCAL statement_timeout = '{timeout_seconds}s'"))
            yield connection


def _drift(row: Any, seen_at: datetime) -> Drift:
    return Drift(seen_at=seen_at, **row._mapping)


def _with(drift: Drift, evidence: Evidence | None) -> Drift:
    return drift if evidence is None else replace(drift, evidence=evidence)
