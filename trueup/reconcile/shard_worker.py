"""The work on one shard of a reconcile run: batch by batch from its cursor to its end, with retries."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from psycopg.errors import QueryCanceled
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from trueup.accounts.user_ids import UserId
from trueup.database.driver_errors import REFUSED, reason_of, sqlstate_of
from trueup.database.engine import translated_errors
from trueup.errors import ServiceUnavailableError
from trueup.host.mapping import HostMapping
from trueup.reconcile.audit import (
    REPORTED_AGAIN_AFTER,
    Defect,
    find_anomalies,
    find_balance_mismatches,
    find_installation_defects,
    find_uncountable,
    find_uncovered_partitions,
    long_read,
    note_defect,
    repair_balance,
    repair_installation,
)
from trueup.reconcile.batch import BatchContext, reconcile_batch
from trueup.reconcile.runs import Finding, RunKind
from trueup.reconcile.shards import (
    MAX_FAILURES,
    PAGE_SIZE,
    Shard,
    ShardLostError,
    Step,
    count_subscriptions,
    count_subscriptions_of,
    end_shard,
    find_suspects,
    measure_shard,
    move_shard,
    reload_shard,
)
from trueup.settings.policies import DEFAULT_POLICIES

# More refused users than this in a shard are not single odd rows. The attempt fails, so that a person sees it at once.
MAX_REFUSED = 100
# So many users who reach the time limit are skipped. The next one fails the attempt: the database is too slow, and each
# such user costs minutes.
MAX_SLOW = 10

Report = Callable[[int, Sequence[Finding], Sequence[Defect]], None]
"""Called after each batch with the number of counters it checked, its findings and its defects."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The context that all shards of a run share.

    `run_id` None: a dry run. `only_user` None: all users of the shard. `batch_size`: users in a batch.
    `scan_timeout_seconds`: time limit of each long read. `stop`: when set, the job ends after its current batch.
    """

    engine: Engine
    context: BatchContext
    run_id: int | None
    kind: RunKind
    only_user: UserId | None
    batch_size: int
    scan_timeout_seconds: int
    report: Report
    stop: threading.Event

    @property
    def mapping(self) -> HostMapping:
        return self.context.mapping


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """Give a connection on which each statement is its own transaction."""
    with engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


def work_shard(job: Job, shard: Shard) -> bool:
    """Work on a claimed shard and release it. Returns True if it is finished, False if `job.stop` was set before.

    A transient error (a deadlock, a lost connection) is retried with backoff, until the shard has failed `MAX_FAILURES`
    times in a row without progress. After a time limit, batches become smaller; a user who reaches the limit alone is
    skipped and recorded as a defect. Any other error ends the attempt: it is stored with the shard, another attempt can
    claim the shard, and the error is raised. Raises `ShardLostError` when another process has taken over the shard.
    """
    try:
        finished = _retry_work(job, shard)
    except ShardLostError:
        raise
    except BaseException as error:
        reason = reason_of(error) if isinstance(error, Exception) else None
        # If this write fails too, the shard's lease expires.
        with suppress(DBAPIError), connected(job.engine) as connection:
            end_shard(connection, shard, finished=False, error=reason)
        raise
    with translated_errors(), connected(job.engine) as connection:
        if not end_shard(connection, shard, finished=finished):
            raise ShardLostError
    return finished


def _retry_work(job: Job, shard: Shard) -> bool:
    failures, place = 0, shard.cursor
    while True:
        try:
            with translated_errors():
                if failures:
                    with connected(job.engine) as connection:
                        reload_shard(connection, shard)
                return _work(job, shard)
        except ServiceUnavailableError:
            failures = 1 if shard.cursor != place else failures + 1
            place = shard.cursor
            if failures >= MAX_FAILURES or shard.slow >= MAX_SLOW or job.stop.wait(0.1 * 2**failures):
                raise


def _work(job: Job, shard: Shard) -> bool:
    """Continue from the shard's cursor. Returns whether the end of the shard was reached."""
    if job.kind == "deep" and shard.cursor is None and not shard.audited:
        _audit(job, shard)
        shard.audited = not job.stop.is_set() or job.run_id is None
    if job.kind == "quick":
        # Without working triggers, balances miss the host's writes, and counters must not be corrected by them. A deep
        # pass repairs the balances first.
        with connected(job.engine) as connection:
            if job.run_id is not None:
                connection.execute(text("SELECT trueup.record_log_state()"))
            connection.execute(text("SELECT trueup.require_watched()"))
            # A dry run cannot record that the log's values have changed, so it refuses to report outdated figures.
            connection.execute(text("SELECT trueup.require_counted() WHERE NOT trueup.has_old_values()"))
        if job.only_user is None and shard.position is None:
            _report_uncovered_partitions(job)
    # Do at least one batch. Otherwise a shard whose first scan takes all the time would never progress.
    moved = False
    while not (moved and job.stop.is_set()):
        suspects, left = _next_page(job, shard)
        if shard.total is None:
            with connected(job.engine) as connection:
                measure_shard(connection, shard, left)
        total, done = max(shard.total or 0, left), 0
        while done < len(suspects):
            if moved and job.stop.is_set():
                return False
            batch = suspects[done : done + (shard.pace or job.batch_size)]
            done += len(batch)
            step = Step(number=shard.number, attempt=shard.attempt, cursor=batch[-1], checked=total - left + done)
            findings = _do_batch(job, shard, batch, step)
            checked, shard.cursor, shard.checked = step.checked - shard.checked, step.cursor, step.checked
            # Grow the batches again, because later users may be faster.
            shard.pace = min(job.batch_size, 2 * (shard.pace or job.batch_size))
            job.report(checked, findings, ())
            moved = True
        if len(suspects) < PAGE_SIZE:
            checked, shard.checked = total - shard.checked, total
            job.report(checked, (), ())
            return True
    return False


def _do_batch(job: Job, shard: Shard, user_ids: list[UserId], step: Step) -> list[Finding]:
    """Do one batch. A user whose row a host's constraint refuses, or who is too slow, does not stop the others."""
    try:
        return _batch(job, user_ids, step)
    except DBAPIError as error:
        slow = isinstance(error.orig, QueryCanceled)
        refused = isinstance(error.orig, REFUSED) and job.run_id is not None and shard.refused < MAX_REFUSED
        if not slow and not refused:
            raise
        if len(user_ids) > 1:
            # Reaching a time limit takes long, so the parts are small: few users share a part with the slow one.
            return _do_in_parts(job, shard, user_ids, step, max(1, len(user_ids) // (10 if slow else 2)))
        if slow:
            return _retry_once(job, shard, user_ids, step)
        shard.refused += 1
        with connected(job.engine) as connection:
            defect = Defect(kind="counter_refused", user_id=user_ids[0], detail={"sqlstate": sqlstate_of(error)})
            note_defect(connection, job.mapping.user_id_type, job.run_id or 0, defect)
        return _record_only(job, user_ids, step)


def _batch(job: Job, user_ids: list[UserId], step: Step) -> list[Finding]:
    with connected(job.engine) as connection:
        findings = reconcile_batch(connection, job.context, job.run_id, user_ids, step)
        uncountable = find_uncountable(connection, job.mapping.user_id_type, user_ids)
        if job.run_id is None:
            job.report(0, (), uncountable)
        else:
            for defect in uncountable:
                note_defect(connection, job.mapping.user_id_type, job.run_id, defect)
        return findings


def _do_in_parts(job: Job, shard: Shard, user_ids: list[UserId], step: Step, size: int) -> list[Finding]:
    """Do a batch again in parts of `size` users."""
    shard.pace = size
    findings: list[Finding] = []
    for start in range(0, len(user_ids), size):
        part = user_ids[start : start + size]
        checked = step.checked - len(user_ids) + start + len(part)
        findings += _do_batch(job, shard, part, replace(step, cursor=part[-1], checked=checked))
    return findings


def _retry_once(job: Job, shard: Shard, user_ids: list[UserId], step: Step) -> list[Finding]:
    """Retry one user who reached a time limit. After a second time, record a defect and skip the user in this run."""
    try:
        return _batch(job, user_ids, step)
    except DBAPIError as error:
        if not isinstance(error.orig, QueryCanceled) or shard.slow >= MAX_SLOW:
            raise
    shard.slow += 1
    defect = Defect(kind="counter_too_slow", user_id=user_ids[0])
    if job.run_id is None:
        job.report(0, (), [defect])
        return []
    with connected(job.engine) as connection:
        note_defect(connection, job.mapping.user_id_type, job.run_id, defect)
        move_shard(connection, job.run_id, step, job.mapping.user_id_type)
    return []


def _record_only(job: Job, user_ids: list[UserId], step: Step) -> list[Finding]:
    """Record the drift of a counter that could not be corrected. Without a drift row it would count as correct."""
    rules = replace(job.context.rules, policies=dict.fromkeys(DEFAULT_POLICIES, "report"))
    try:
        with connected(job.engine) as connection:
            return reconcile_batch(connection, replace(job.context, rules=rules), job.run_id, user_ids, step)
    except DBAPIError:
        with connected(job.engine) as connection:
            move_shard(connection, job.run_id or 0, step, job.mapping.user_id_type)
        return []


def _next_page(job: Job, shard: Shard) -> tuple[list[UserId], int]:
    """Return the next page of suspects, and the number of subscriptions left in the shard."""
    with long_read(job.engine, job.scan_timeout_seconds) as connection:
        if job.only_user is not None:
            found = count_subscriptions_of(connection, job.mapping, job.only_user)
            return [job.only_user] * min(found, 1), found
        left = count_subscriptions(connection, job.mapping, shard.position, shard.last)
        return find_suspects(connection, job.mapping, shard.position, shard.last), left


def _report_uncovered_partitions(job: Job) -> None:
    """Record partitions that were added after the attach. They have no triggers, so balances may miss their rows."""
    with connected(job.engine) as connection:
        found = find_uncovered_partitions(connection, reported_within=REPORTED_AGAIN_AFTER)
        if job.run_id is None:
            job.report(0, (), found)
            return
        for defect in found:
            note_defect(connection, job.mapping.user_id_type, job.run_id, defect)


def _audit(job: Job, shard: Shard) -> None:
    """Compare balances with the log and repair them. It may be repeated: a repaired defect is not found again."""
    kind = job.mapping.user_id_type
    after, last = shard.position, shard.last
    with long_read(job.engine, job.scan_timeout_seconds) as reader:
        installation = find_installation_defects(reader) if shard.after is None else []
        anomalies = find_anomalies(reader, kind, after, last)
        mismatches = find_balance_mismatches(reader, job.mapping, after, last)
    if job.run_id is None:
        job.report(0, (), [*installation, *mismatches, *anomalies])
        return
    with connected(job.engine) as connection:
        repair_installation(connection, kind, job.run_id, installation)
        for anomaly in anomalies:
            note_defect(connection, kind, job.run_id, anomaly)
        for user_id, defects in _by_user(mismatches).items():
            if job.stop.is_set():
                return
            _repair(connection, job, shard, user_id, defects)


def _by_user(defects: Sequence[Defect]) -> dict[UserId, list[Defect]]:
    found: dict[UserId, list[Defect]] = {}
    for defect in defects:
        if defect.user_id is not None:
            found.setdefault(defect.user_id, []).append(defect)
    return found


def _repair(connection: Connection, job: Job, shard: Shard, user_id: UserId, defects: list[Defect]) -> None:
    """Repair a user's balance. If that reaches the time limit, record the defects unrepaired and continue."""
    kind, run_id = job.mapping.user_id_type, job.run_id or 0
    try:
        repair_balance(connection, kind, run_id, user_id)
    except DBAPIError as error:
        if not isinstance(error.orig, QueryCanceled) or shard.slow >= MAX_SLOW:
            raise
        shard.slow += 1
        for defect in defects:
            note_defect(connection, kind, run_id, defect)
