"""Working on one shard of a reconcile run: from its cursor to its end, batch by batch, through errors that pass."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from billing import db
from billing.deep import (
    Defect,
    find_installation_defects,
    find_oddities,
    find_untrue_balances,
    note_defect,
    patient,
    repair_balances,
    repair_installation,
)
from billing.errors import ServiceUnavailableError
from billing.mapping import HostMapping
from billing.reconcile_batch import BatchContext, reconcile_batch
from billing.reconcile_runs import Finding, RunKind
from billing.rules import DEFAULT_POLICIES
from billing.shards import (
    MOST_FAILURES,
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
from billing.users import UserId

QUERY_CANCELED = "57014"
# Wrong data, a violated constraint, a view's check, RAISE in a trigger: of one row, not of the server.
REFUSED = ("22", "23", "44", "P0001")
# More than so many in a shard are no odd rows: then something is wrong that a person should see at once.
MOST_REFUSED = 100

Report = Callable[[int, Sequence[Finding], Sequence[Defect]], None]
"""Called after each batch with how many counters it checked, and what it found."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all shards of a run share. `run_id` None: a dry run. `only_user` None: all users of the shard.

    `stop`: set when the work is to end at the next batch.
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
    """Work on a shard that was claimed, and let go of it. Returns whether it is finished: not so when asked to stop.

    An error that may pass (a deadlock, a time limit, a lost connection) is tried again, `MOST_FAILURES` times in a row
    at most, after a time limit with smaller batches. Any other ends the attempt: the shard is left for another, with
    the reason, and the error raised. Raises `ShardLostError` when another has taken it over.
    """
    try:
        finished = _persevere(job, shard)
    except ShardLostError:
        raise
    except BaseException as error:
        reason = db.reason_of(error) if isinstance(error, Exception) else None
        # Where even this can't be written, the lease runs out.
        with suppress(DBAPIError), connected(job.engine) as connection:
            end_shard(connection, shard, finished=False, error=reason)
        raise
    with db.translated_errors(), connected(job.engine) as connection:
        if not end_shard(connection, shard, finished=finished):
            raise ShardLostError
    return finished


def _persevere(job: Job, shard: Shard) -> bool:
    size, failures, place = job.batch_size, 0, shard.cursor
    while True:
        try:
            with db.translated_errors():
                if failures:
                    with connected(job.engine) as connection:
                        reload_shard(connection, shard)
                return _work(job, shard, size)
        except ServiceUnavailableError as error:
            too_slow = getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) == QUERY_CANCELED
            if too_slow and size > 1:
                size = max(1, size // 10)
                continue
            failures = 1 if shard.cursor != place else failures + 1
            place = shard.cursor
            if failures >= MOST_FAILURES or job.stop.wait(0.1 * 2**failures):
                raise
            if getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) == QUERY_CANCELED:
                size = max(1, size // 4)


def _work(job: Job, shard: Shard, size: int) -> bool:
    """Go on from the shard's cursor. Returns whether its end was reached."""
    if job.kind == "deep" and shard.cursor is None and not shard.audited:
        _audit(job, shard)
        shard.audited = not job.stop.is_set() or job.run_id is None
    # Something is always done: a shard whose first look takes all the time would else never get on.
    moved = False
    while not (moved and job.stop.is_set()):
        suspects, left = _look(job, shard)
        if shard.total is None:
            with connected(job.engine) as connection:
                measure_shard(connection, shard, left)
        total = max(shard.total or 0, left)
        for start in range(0, len(suspects), size):
            if moved and job.stop.is_set():
                return False
            batch = suspects[start : start + size]
            step = Step(
                number=shard.number,
                attempt=shard.attempt,
                cursor=batch[-1],
                checked=total - left + start + len(batch),
            )
            findings = _settled(job, shard, batch, step)
            done, shard.cursor, shard.checked = step.checked - shard.checked, step.cursor, step.checked
            job.report(done, findings, ())
            moved = True
        if len(suspects) < PAGE_SIZE:
            done, shard.checked = total - shard.checked, total
            job.report(done, (), ())
            return True
    return False


def _settled(job: Job, shard: Shard, user_ids: list[UserId], step: Step) -> list[Finding]:
    """Do one batch; what the database refuses for one user's row (a host's constraint, say) stops only that one."""
    try:
        with connected(job.engine) as connection:
            return reconcile_batch(connection, job.context, job.run_id, user_ids, step)
    except DBAPIError as error:
        state = str(getattr(error.orig, "sqlstate", None))
        if not state.startswith(REFUSED) or job.run_id is None or shard.refused >= MOST_REFUSED:
            raise
        if len(user_ids) > 1:
            half = len(user_ids) // 2
            first = replace(step, cursor=user_ids[half - 1], checked=step.checked - len(user_ids) + half)
            return [*_settled(job, shard, user_ids[:half], first), *_settled(job, shard, user_ids[half:], step)]
        shard.refused += 1
        defect = Defect(kind="counter_refused", user_id=user_ids[0], detail={"sqlstate": state})
        with connected(job.engine) as connection:
            note_defect(connection, job.mapping.user_id_type, job.run_id, defect)
        return _told(job, user_ids, step)


def _told(job: Job, user_ids: list[UserId], step: Step) -> list[Finding]:
    """Write down what is wrong with a counter that could not be set right. Without a row it would count as right."""
    rules = replace(job.context.rules, policies=dict.fromkeys(DEFAULT_POLICIES, "report"))
    try:
        with connected(job.engine) as connection:
            return reconcile_batch(connection, replace(job.context, rules=rules), job.run_id, user_ids, step)
    except DBAPIError:
        with connected(job.engine) as connection:
            move_shard(connection, job.run_id or 0, step, job.mapping.user_id_type)
        return []


def _look(job: Job, shard: Shard) -> tuple[list[UserId], int]:
    """Return the next page of suspects, and how many subscriptions are left in the shard."""
    with patient(job.engine, job.scan_timeout_seconds) as connection:
        if job.only_user is not None:
            found = count_subscriptions_of(connection, job.mapping, job.only_user)
            return [job.only_user] * min(found, 1), found
        left = count_subscriptions(connection, job.mapping, shard.position, shard.last)
        return find_suspects(connection, job.mapping, shard.position, shard.last), left


def _audit(job: Job, shard: Shard) -> None:
    """The deep part of a deep pass. It may be done again from its start: what is repaired is no defect any more."""
    kind = job.mapping.user_id_type
    after, last = shard.position, shard.last
    with patient(job.engine, job.scan_timeout_seconds) as reader:
        installation = find_installation_defects(reader) if shard.after is None else []
        oddities = find_oddities(reader, kind, after, last)
        untrue = find_untrue_balances(reader, job.mapping, after, last)
    if job.run_id is None:
        job.report(0, (), [*installation, *untrue, *oddities])
        return
    with connected(job.engine) as connection:
        repair_installation(connection, kind, job.run_id, installation)
        for oddity in oddities:
            note_defect(connection, kind, job.run_id, oddity)
        for _ in repair_balances(connection, kind, job.run_id, untrue):
            if job.stop.is_set():
                return
