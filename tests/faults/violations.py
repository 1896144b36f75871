"""What must never be: the names of it, and how it is told."""

from dataclasses import dataclass

VIOLATIONS = {
    "overshoot": "tokens logged beyond a budget, the provider's own excess left out",
    "late_overshoot": "tokens logged beyond a budget by a charge whose hold had ended",
    "double_charge": "a provider call recorded more than once",
    "lost_usage": "a served call that is neither recorded nor named",
    "wrong_usage": "a charge that is not what the provider billed (of a stream without usage: what arrived), or is no "
    "call of the provider's at all",
    "wrong_user": "usage recorded under another user",
    "unmetered_call": "a provider call of a task that never had a hold",
    "wrong_extension": "a hold's extension that was granted and added other than was asked, or denied and added some",
    "message_sent_twice": "a direct message or public reply that Instagram accepted more than once",
    "message_untold": "an accepted message whose row in the outbox says neither sent nor unknown",
    "message_not_sent": "a message that is said to be sent, and that Instagram never accepted so",
    "leaked_hold": "tokens still held when every task has ended",
    "mismatched_balance": "a balance that is not the sum of the log",
    "drift": "a counter that is wrong after a reconcile pass",
    "lost_task": "a task that had begun and never ended, though Redis was not emptied",
    "lost_result": "work that is done, and whose result is gone, though its answers were kept to make it again",
    "message_flood": "messages that multiply: more are left in the broker than were sent",
    "worker_crash": "a worker that ended by itself",
}

# How a task ends, if it has a result or none.
DONE, NO_RESULT, UNFINISHED, WAITING, REJECTED = "done", "no result", "unfinished", "waits for its retry", "Reject"
UNENDED = (NO_RESULT, UNFINISHED, WAITING, REJECTED)


@dataclass(frozen=True, kw_only=True)
class Violation:
    """An invariant that did not hold. `tokens`: how many, where tokens are what it is about."""

    kind: str
    detail: str
    tokens: int = 0
