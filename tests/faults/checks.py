"""The invariants, checked against the database and the provider's ledger after a round has settled."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from tests.faults.books import Books
from tests.faults.effects import effect_violations
from tests.faults.kinds import REDIS_KINDS
from tests.faults.ledger import Serving
from tests.faults.requests import request_violations
from tests.faults.violations import UNENDED, WAITING, Violation
from tests.support.books import assert_true
from tests.support.host import Host
from trueup.accounts.account import read_account
from trueup.errors import TrueupError
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile

if TYPE_CHECKING:
    from tests.faults.stages import Stage


def violations(stage: "Stage", books: Books) -> list[Violation]:
    """Return every violation of an invariant."""
    with stage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        return [
            *_overshoot(stage, connection, books),
            *_charged_once(connection, books),
            *_charged_rightly(stage, books),
            *_lost(books),
            *_unmetered(stage, books),
            *_extended(stage),
            *request_violations(stage, books),
            *effect_violations(stage, books),
            *_held(connection),
            *_mismatch(stage),
            *_drift(stage, connection),
            *_vanished(stage, books),
            *_flooded(stage),
            *(Violation(kind="worker_crash", detail=crash) for worker in stage.workers for crash in worker.crashes),
        ]


def _overshoot(stage: "Stage", connection: Connection, books: Books) -> Iterator[Violation]:
    """I2: a user's log stays within the budget, except for tokens that the provider billed beyond the request."""
    rows = connection.execute(text("SELECT user_id, sum(total_tokens) FROM ai_usage_log WHERE success GROUP BY 1"))
    logged: dict[int, int] = {user: int(tokens) for user, tokens in rows}
    by_name = {serving.model_name: serving for serving in books.servings}
    excess, late = Counter[int](), Counter[int]()
    for charge in books.charges:
        serving = by_name.get(charge.model_name)
        excess[charge.user_id] += max(0, min(charge.tokens_total, serving.billed) - serving.asked) if serving else 0
        late[charge.user_id] += charge.tokens_total - charge.tokens_covered if charge.late else 0
    for user, budget in zip(stage.users, stage.plan.budgets, strict=True):
        over = logged.get(user, 0) - budget - excess[user]
        if over > 0:
            kind = "late_overshoot" if over <= late[user] else "overshoot"
            detail = f"user {user}: {logged[user]} logged, budget {budget}, billed over the asked {excess[user]}"
            yield Violation(kind=kind, tokens=over, detail=f"{detail}, late and uncovered {late[user]}")


def _charged_once(connection: Connection, books: Books) -> Iterator[Violation]:
    """I3: one charge for each call of a task, one log row for each charge, and no serving recorded twice."""
    # A call that two attempts have bought is two servings and two charges. Each serving may be in one of them.
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


def _charged_rightly(stage: "Stage", books: Books) -> Iterator[Violation]:
    """Each charge and its log row match one serving of the provider: same task, call, user and tokens.

    A stream that broke or was closed early is charged for the text that arrived, and the log row says so. The
    provider may bill more than that without telling the caller: at most the call's maximum cost, and the report
    counts it. A process that was suspended in the middle of a stream may find that its time is over, and break it off.
    """
    by_name = {serving.model_name: serving for serving in books.servings}
    for charge in books.charges:
        name = f"charge {charge.call_key} of {charge.task_id}"
        serving = by_name.get(charge.model_name)
        if serving is None or (serving.task_id, serving.fingerprint) != (
            charge.task_id,
            charge.fingerprint,
        ):
            yield Violation(kind="wrong_usage", detail=f"{name} names {charge.model_name}: {serving}")
        elif serving.pid in stage.stopped and _is_part_of(serving, charge):
            continue
        elif not serving.chargeable == charge.tokens_total == charge.log_tokens:
            due = f"billed {serving.billed}, of these known to its caller {serving.chargeable} ({serving.behaviour})"
            detail = f"{name}: {due}, charged {charge.tokens_total}, logged {charge.log_tokens}"
            yield Violation(kind="wrong_usage", detail=detail, tokens=abs(serving.chargeable - charge.tokens_total))
        elif charge.usage_reported is not serving.usage_seen:
            detail = f"{name}: usage_reported is {charge.usage_reported}, but it is {serving.usage_seen} that it was"
            yield Violation(kind="wrong_usage", detail=detail)
        elif not serving.user_id == charge.user_id == charge.log_user:
            detail = f"{name}: used by {serving.user_id}, charged to {charge.user_id}, logged to {charge.log_user}"
            yield Violation(kind="wrong_user", detail=detail, tokens=charge.tokens_total)


def _is_part_of(serving: Serving, charge: Any) -> bool:
    """Return whether a charge, and its log row, are for a stream's prompt and a part of its text, and say so."""
    is_counted = serving.streamed and charge.usage_reported is False and charge.tokens_total == charge.log_tokens
    return is_counted and serving.prompt_tokens <= charge.tokens_total <= serving.prompt_tokens + serving.tokens_sent


def _lost(books: Books) -> Iterator[Violation]:
    for call in books.unrecorded:
        if call.lost:
            yield Violation(kind="lost_usage", detail=str(call), tokens=call.serving.billed)


def _unmetered(stage: "Stage", books: Books) -> Iterator[Violation]:
    """A task without a hold, such as a denied one, has neither called the provider nor been charged."""
    asked = defaultdict(list)
    for serving in books.servings:
        asked[serving.task_id].append(serving.serial)
    for task in {charge.task_id for charge in books.charges} | set(asked):
        if task not in books.tasks_admitted:
            detail = f"{task} ({stage.outcomes.get(task, 'unknown')}): servings {asked[task]}"
            yield Violation(kind="unmetered_call", detail=detail)


def _extended(stage: "Stage") -> Iterator[Violation]:
    """An extension adds the requested tokens, or none. (An earlier attempt's call may change the rest of the hold.)"""
    for task, extensions in extensions_of(stage).items():
        for extension in extensions:
            due = extension["asked"] if extension["granted"] else 0
            if extension["attempt"] == 1 and extension["added"] != due:
                tokens = abs(extension["added"] - due)
                yield Violation(kind="wrong_extension", detail=f"{task}: {extension}", tokens=tokens)


def extensions_of(stage: "Stage") -> dict[str, list[dict[str, Any]]]:
    """Return how the completed tasks have extended their holds, by task."""
    return {
        task: result["extensions"]
        for task, result in stage.results.items()
        if isinstance(result, dict) and "extensions" in result
    }


def ended_by_nothing(stage: "Stage") -> list[str]:
    """Return the tasks without an end, in a round that should have ended all. Only a flush may lose a task."""
    if stage.flushed or not stage.settled:
        return []
    return [task for task, outcome in stage.outcomes.items() if outcome in UNENDED]


def _vanished(stage: "Stage", books: Books) -> Iterator[Violation]:
    """At least once: a begun task comes to an end, unless the transport has lost its message."""
    for task in ended_by_nothing(stage):
        if task in books.tasks_completed:
            if not result_may_be_lost(stage, task):
                yield Violation(kind="lost_result", detail=f"{task}: {stage.outcomes[task]}")
        elif not lost_by_transport(stage, books, task):
            yield Violation(kind="lost_task", detail=f"{task}: {stage.outcomes[task]}")


def result_may_be_lost(stage: "Stage", task_id: str) -> bool:
    """Return whether a task's result can't be made again. Answers of streams that it ended early are not kept.

    Celery stores a duplicate's state over a result that comes at the same moment. The duplicate then makes it
    again.
    """
    tasks = [task for task in stage.plan.tasks if task.task_id == task_id]
    return any(task.chunks_read(call) for task in tasks for call in range(1, len(task.script) + 1))


def lost_by_transport(stage: "Stage", books: Books, task: str) -> bool:
    """Return whether the message of a task without an end was lost.

    It may be its first message, that of its retry, or a message that waited for another attempt. kombu removes a
    message from the queue before it records it as unacknowledged. If Redis stops in between, the message is in
    neither.
    """
    begun = task in books.tasks_begun or any(serving.task_id == task for serving in books.servings)
    cut = any(injected.kind in REDIS_KINDS for injected in stage.injected)
    waited = stage.outcomes[task] == WAITING or task in books.tasks_waited
    return not begun or (cut and waited)


def _flooded(stage: "Stage") -> Iterator[Violation]:
    """A task's duplicates wait or are dropped. They are never more than its deliveries."""
    sent = sum(task.copies for task in stage.plan.tasks)
    if stage.messages_left > sent:
        yield Violation(kind="message_flood", detail=f"{sent} messages sent, {stage.messages_left} left")


def _held(connection: Connection) -> Iterator[Violation]:
    """I4: every hold has ended, and no tokens are held."""
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


def _mismatch(stage: "Stage") -> Iterator[Violation]:
    """I1: the balance is the sum of the log, now and at every check during the round."""
    findings = list(stage.audit.findings)
    with Host(stage.engine) as host:
        try:
            assert_true(host)
        except AssertionError as error:
            findings.append(str(error))
    for finding in findings[:3]:
        yield Violation(kind="mismatched_balance", detail=finding)


def _drift(stage: "Stage", connection: Connection) -> Iterator[Violation]:
    """After one reconcile pass every counter shows the remaining tokens."""
    try:
        reconcile(stage.engine, HostMapping())
    except (TrueupError, DBAPIError) as error:
        yield Violation(kind="drift", detail=f"reconcile failed: {error}")
    for user in stage.users:
        drift = read_account(connection, user).drift
        if drift:
            yield Violation(kind="drift", detail=f"user {user}", tokens=abs(drift))
