"""Checks of requests: whose result an id has, and that work that is done or under way is not done again."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tests.faults.books import Books
from tests.faults.kinds import REDIS_KINDS
from tests.faults.planned import Spending
from tests.faults.violations import Violation

if TYPE_CHECKING:
    from tests.faults.stages import Stage

# A call that the database granted before may reach the provider so much later.
GRANTED_SECONDS = 1.0
# These can end the hold of a process that lives: they cut its heartbeat off, or expire every hold by another clock.
_HOLD_ENDING_KINDS = (
    "postgres_restarted",
    "database_sessions_cut",
    "database_sessions_cut_after_charge",
    "database_sessions_cut_while_sending",
    "child_stopped_past_hold",
)


def request_violations(stage: "Stage", books: Books) -> Iterator[Violation]:
    """Yield what went wrong between requests, or between the attempts of one."""
    requests = {task.label: task for task in stage.plan.spendings}
    holds = {label: _holds_of(stage, books, task) for label, task in requests.items()}
    for task_id in {task.task_id for task in requests.values()}:
        yield from _wrong_answers(books, task_id, stage.results.get(task_id))
        detail = _wrong_result(stage, holds, [task for task in requests.values() if task.task_id == task_id])
        if detail:
            told = "; ".join(_told(label, hold) for label in holds for hold in holds[label] if hold.task_id == task_id)
            yield Violation(kind="wrong_result", detail=f"{task_id}: {detail}. Holds: {told}")
    yield from _unknown_requests(books, requests, holds)
    for label, task in requests.items():
        yield from _bought_again(stage, books, label, holds[label])
        if task.works and _ran_again(stage, books, label, holds[label]):
            yield Violation(kind="ran_again", detail=f"{label}: {[dict(hold._mapping) for hold in holds[label]]}")


def _holds_of(stage: "Stage", books: Books, task: Spending) -> list[Any]:
    if task.user >= len(stage.users):
        return []
    user = stage.users[task.user]
    request = task.fingerprint(user)
    return [h for h in books.holds if (h.user_id, h.task_id, h.request) == (user, task.task_id, request)]


def _told(label: str, hold: Any) -> str:
    done = " completed" if hold.completed else ""
    return f"{hold.id} of {label}, attempt {hold.attempt}, {hold.status}{done} at {hold.ended_at}"


def _wrong_answers(books: Books, task_id: str, result: Any) -> Iterator[Violation]:
    """A request is answered by servings of its own."""
    by_name = {serving.model_name: serving for serving in books.servings}
    for answer in result["answers"] if isinstance(result, dict) else []:
        label = by_name[answer].label if answer in by_name else None
        if label != result["request"]:
            detail = f"{task_id}: the result of {result['request']} has the answer {answer} to {label}"
            yield Violation(kind="wrong_result", detail=detail)


def _wrong_result(stage: "Stage", holds: dict[str, list[Any]], requests: list[Spending]) -> str | None:
    """The stored result is that of the last request with its id that did its work.

    A request that was sent when an earlier one had its result has a result or an error of its own, unless Redis has
    lost its message. (A request that is refused because its id is in use leaves the id to the running one. That is so
    also if the earlier one had failed, and a copy of its message had begun it again.)
    """
    result = stage.results.get(requests[0].task_id)
    if not isinstance(result, dict) or stage.flushed or not stage.settled:
        return None
    done = {}
    for task in requests:
        ids = [hold.id for hold in holds[task.label] if hold.completed]
        if ids:
            done[task.label] = min(ids)
    last = max(done, key=done.__getitem__, default=None)
    # A process that was stopped past its hold may still store its result, and completes none.
    own = holds[result["request"]]
    if own and result["request"] not in done and own[-1].id > done.get(last, 0):
        return None
    if result["request"] != last:
        return f"its result is that of {result['request']}, and {last} was done last"
    later = [task.label for task in requests if task.label in stage.sent_after and task.request > 1]
    cut = any(injected.kind in REDIS_KINDS for injected in stage.injected)
    refused = [label for label in later if not holds[label] and len(own) > 1]
    if later and later != refused and result["request"] not in later and not cut:
        return f"{later} was sent when {result['request']} had its result, and finds that one"
    return None


def _unknown_requests(books: Books, requests: dict[str, Spending], holds: dict[str, list[Any]]) -> Iterator[Violation]:
    """Each hold belongs to a request of the plan: otherwise these checks would see nothing."""
    ids, known = {task.task_id for task in requests.values()}, {hold.id for found in holds.values() for hold in found}
    for hold in books.holds:
        if hold.task_id in ids and hold.id not in known:
            detail = f"{hold.task_id}: a hold of user {hold.user_id} for another request, {hold.request}"
            yield Violation(kind="wrong_result", detail=detail)


def _bought_again(stage: "Stage", books: Books, label: str, holds: list[Any]) -> Iterator[Violation]:
    """After a request's work is done, no process buys for it: only a stopped process may come too late."""
    ends = [hold.ended_at.timestamp() for hold in holds if hold.completed and hold.ended_at is not None]
    if not ends:
        return
    done_at = min(ends) - time.time() + time.monotonic()
    for serving in books.servings:
        late = serving.label == label and serving.started_at > done_at + GRANTED_SECONDS
        if late and serving.pid not in stage.stopped:
            seconds = serving.started_at - done_at
            detail = f"{label} call {serving.call}, serving {serving.serial}, {seconds:.1f} s after its work was done"
            yield Violation(kind="bought_again", detail=detail, tokens=serving.billed)


def _ran_again(stage: "Stage", books: Books, label: str, holds: list[Any]) -> bool:
    """Return whether a task lost its first hold, although its process lived and could beat.

    Its calls succeed, so that it asks for no retry.
    """
    first = next((serving for serving in books.servings if serving.label == label), None)
    ended_by_fault = any(injected.kind in _HOLD_ENDING_KINDS for injected in stage.injected)
    if first is None or ended_by_fault or not stage.settled or first.pid in {*stage.killed, *stage.stopped}:
        return False
    return any(hold.id == holds[0].id and (hold.attempt > 1 or hold.status == "expired") for hold in holds)
