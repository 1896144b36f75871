"""The invariants, from the database and from the provider's ledger, after a round has settled."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from billing.accounts import read_account
from billing.errors import TrueupError
from billing.holds import expire_holds
from billing.mapping import HostMapping
from billing.reconcile import reconcile
from tests.faults.injections import past_every_hold
from tests.faults.ledger import Serving
from tests.faults.unrecorded import Unrecorded, find_unrecorded
from tests.support.books import assert_true
from tests.support.host import Host

if TYPE_CHECKING:
    from tests.faults.rounds import Stage

VIOLATIONS = {
    "overshoot": "tokens logged beyond a budget, the provider's own excess left out",
    "late_overshoot": "tokens logged beyond a budget by a charge whose hold had ended",
    "double_charge": "a provider call recorded more than once",
    "lost_usage": "a served call that is neither recorded nor named",
    "wrong_usage": "a charge that is not what the provider billed, or no call of the provider's at all",
    "wrong_user": "usage recorded under another user",
    "unmetered_call": "a provider call of a task that never had a hold",
    "leaked_hold": "tokens still held when every task has ended",
    "untrue_balance": "a balance that is not the sum of the log",
    "drift": "a counter that is wrong after a reconcile pass",
    "lost_task": "a task that had begun and never ended, though Redis was not emptied",
    "worker_crash": "a worker that ended by itself",
}


@dataclass(frozen=True, kw_only=True)
class Violation:
    """An invariant that did not hold. `tokens`: how many, where tokens are what it is about."""

    kind: str
    detail: str
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Books:
    """What the database says after a round, beside the ledger. `named`: the table of calls in flight is there."""

    charges: list[Any]
    tasks_admitted: set[str]
    servings: list[Serving]
    unrecorded: list[Unrecorded]
    named: bool
    expired: int
    late: int


NO_RESULT, UNFINISHED, REJECTED = "no result", "unfinished", "Reject"

_CHARGES = """
    SELECT c.user_id, c.task_id, c.call_key, split_part(c.call_key, ':', 1)::int AS call, c.model_name,
           c.tokens_total, c.tokens_covered, c.late, l.user_id AS log_user, l.total_tokens AS log_tokens
    FROM trueup.charge c LEFT JOIN ai_usage_log l ON l.id::text = c.log_id
"""
_INTENTS = """
    SELECT user_id, task_id, split_part(call_key, ':', 1)::int AS call, attempt, tokens_bound, outcome
    FROM trueup.call_intent
"""


def read_books(stage: "Stage") -> Books:
    """Take back what dead tasks hold, as the sweep does when their leases have run out, and read everything."""
    with stage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        expired = 0
        while (holds := expire_holds(connection, now=past_every_hold())[0]) > 0:
            expired += holds
        charges = list(connection.execute(text(_CHARGES)))
        servings = stage.provider.ledger.servings()
        named = bool(connection.scalar(text("SELECT to_regclass('trueup.call_intent') IS NOT NULL")))
        intents = list(connection.execute(text(_INTENTS))) if named else None
        return Books(
            charges=charges,
            tasks_admitted=set(connection.scalars(text("SELECT DISTINCT task_id FROM trueup.hold"))),
            servings=servings,
            unrecorded=find_unrecorded(servings, {charge.model_name for charge in charges}, intents, stage.killed),
            named=named,
            expired=expired,
            late=sum(charge.late for charge in charges),
        )


def violations(stage: "Stage", books: Books) -> list[Violation]:
    """Return every invariant that does not hold."""
    with stage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        return [
            *_overshoot(stage, connection, books),
            *_charged_once(connection, books),
            *_charged_rightly(books),
            *_lost(books),
            *_unmetered(stage, books),
            *_held(connection),
            *_untrue(stage),
            *_drift(stage, connection),
            *_vanished(stage, books),
            *(Violation(kind="worker_crash", detail=crash) for worker in stage.workers for crash in worker.crashes),
        ]


def _overshoot(stage: "Stage", connection: Connection, books: Books) -> Iterator[Violation]:
    """I2: a user's log stays within the budget, but for what the provider billed over what it was asked for."""
    rows = connection.execute(text("SELECT user_id, sum(total_tokens) FROM ai_usage_log WHERE success GROUP BY 1"))
    logged: dict[int, int] = {user: int(tokens) for user, tokens in rows}
    by_name = {serving.model_name: serving for serving in books.servings}
    excess, late = Counter[int](), Counter[int]()
    for charge in books.charges:
        serving = by_name.get(charge.model_name)
        excess[charge.user_id] += serving.over if serving else 0
        late[charge.user_id] += charge.tokens_total - charge.tokens_covered if charge.late else 0
    for user, budget in zip(stage.users, stage.plan.budgets, strict=True):
        over = logged.get(user, 0) - budget - excess[user]
        if over > 0:
            kind = "late_overshoot" if over <= late[user] else "overshoot"
            detail = f"user {user}: {logged[user]} logged, budget {budget}, billed over the asked {excess[user]}"
            yield Violation(kind=kind, tokens=over, detail=f"{detail}, late and uncovered {late[user]}")


def _charged_once(connection: Connection, books: Books) -> Iterator[Violation]:
    """I3: one charge for each call of a task, one log row for each charge, and no serving recorded twice."""
    # A call that two attempts have bought is two servings, and two charges; each serving may be in one of them.
    for what, counts in (
        ("call", Counter((charge.task_id, charge.call_key) for charge in books.charges)),
        ("serving", Counter(charge.model_name for charge in books.charges)),
    ):
        for name, count in counts.items():
            if count > 1:
                yield Violation(kind="double_charge", detail=f"{what} {name} has {count} charges")
    rows, tokens = connection.execute(
        text("SELECT count(*), coalesce(sum(total_tokens), 0)::bigint FROM ai_usage_log WHERE metadata ? 'task_id'")
    ).one()
    charged = sum(charge.tokens_total for charge in books.charges)
    if (rows, tokens) != (len(books.charges), charged):
        detail = f"{rows} log rows of {tokens} tokens, {len(books.charges)} charges of {charged}"
        yield Violation(kind="double_charge", detail=detail, tokens=abs(tokens - charged))


def _charged_rightly(books: Books) -> Iterator[Violation]:
    """Each charge and its log row are one serving of the provider's: same task, call, user and tokens."""
    by_name = {serving.model_name: serving for serving in books.servings}
    for charge in books.charges:
        name = f"charge {charge.call_key} of {charge.task_id}"
        serving = by_name.get(charge.model_name)
        if serving is None or (serving.task_id, serving.call) != (charge.task_id, charge.call):
            yield Violation(kind="wrong_usage", detail=f"{name} names {charge.model_name}: {serving}")
        elif not serving.billed == charge.tokens_total == charge.log_tokens:
            detail = f"{name}: billed {serving.billed}, charged {charge.tokens_total}, logged {charge.log_tokens}"
            yield Violation(kind="wrong_usage", detail=detail, tokens=abs(serving.billed - charge.tokens_total))
        elif not serving.user_id == charge.user_id == charge.log_user:
            detail = f"{name}: used by {serving.user_id}, charged to {charge.user_id}, logged to {charge.log_user}"
            yield Violation(kind="wrong_user", detail=detail, tokens=charge.tokens_total)


def _lost(books: Books) -> Iterator[Violation]:
    for call in books.unrecorded:
        if call.lost:
            yield Violation(kind="lost_usage", detail=str(call), tokens=call.serving.billed)


def _unmetered(stage: "Stage", books: Books) -> Iterator[Violation]:
    """A task without a hold, as one that was denied, has neither asked the provider nor been charged."""
    asked = defaultdict(list)
    for serving in books.servings:
        asked[serving.task_id].append(serving.serial)
    for task in {charge.task_id for charge in books.charges} | set(asked):
        if task not in books.tasks_admitted:
            detail = f"{task} ({stage.outcomes.get(task, 'unknown')}): servings {asked[task]}"
            yield Violation(kind="unmetered_call", detail=detail)


def ended_by_nothing(stage: "Stage") -> list[str]:
    """Return the tasks that have no end, in a round that should have ended them all: only a flush may lose a task."""
    if stage.flushed or not stage.settled:
        return []
    return [task for task, outcome in stage.outcomes.items() if outcome in (NO_RESULT, UNFINISHED, REJECTED)]


def _vanished(stage: "Stage", books: Books) -> Iterator[Violation]:
    """At least once: a task that has begun comes to an end. (One that never began is a message the transport lost:
    kombu takes it off the queue before it notes it as unacknowledged.)
    """
    for task in ended_by_nothing(stage):
        if task in books.tasks_admitted:
            yield Violation(kind="lost_task", detail=f"{task}: {stage.outcomes[task]}")


def _held(connection: Connection) -> Iterator[Violation]:
    """I4: every hold has ended, and nothing is held."""
    rows = connection.execute(
        text(
            """
            SELECT user_id, b.held, coalesce(h.holds, 0) AS holds
            FROM trueup.balance b FULL JOIN (
                SELECT user_id, count(*) AS holds FROM trueup.hold WHERE status = 'open' GROUP BY user_id) h
            USING (user_id) WHERE b.held <> 0 OR h.holds > 0
            """
        )
    )
    for row in rows:
        yield Violation(kind="leaked_hold", detail=f"user {row.user_id}: {row.holds} open holds", tokens=row.held or 0)


def _untrue(stage: "Stage") -> Iterator[Violation]:
    """I1: the balance is the sum of the log; now, and whenever it was looked at."""
    findings = list(stage.audit.findings)
    with Host(stage.engine) as host:
        try:
            assert_true(host)
        except AssertionError as error:
            findings.append(str(error))
    for finding in findings[:3]:
        yield Violation(kind="untrue_balance", detail=finding)


def _drift(stage: "Stage", connection: Connection) -> Iterator[Violation]:
    """After one reconcile pass every counter shows what remains."""
    try:
        reconcile(stage.engine, HostMapping())
    except (TrueupError, DBAPIError) as error:
        yield Violation(kind="drift", detail=f"reconcile failed: {error}")
    for user in stage.users:
        drift = read_account(connection, user).drift
        if drift:
            yield Violation(kind="drift", detail=f"user {user}", tokens=abs(drift))
