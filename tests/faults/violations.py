"""The violations that a fault run looks for, with their meanings."""

from dataclasses import dataclass

VIOLATIONS = {
    "overshoot": "tokens logged beyond a budget, without the provider's own excess",
    "late_overshoot": "tokens logged beyond a budget by a charge whose hold had ended",
    "double_charge": "a provider call recorded more than once",
    "lost_usage": "a served call that is neither recorded nor named as unrecorded",
    "wrong_usage": "a charge that differs from the provider's bill (for a stream without usage: from the part that "
    "arrived), or has no provider call",
    "wrong_user": "usage recorded under another user",
    "wrong_result": "a request with a result, or an answer, that belongs to another request with the same task id",
    "bought_again": "a call that a process bought after the work of its request was done",
    "ran_again": "a task that another attempt began again while its process lived and was not suspended",
    "unmetered_call": "a provider call of a task that never had a hold",
    "wrong_extension": "a granted extension of another amount than requested, or a denied extension that added tokens",
    "message_sent_twice": "a direct message or public reply that Instagram accepted more than once",
    "message_untold": "an accepted message whose outbox row is neither `sent` nor `unknown`",
    "message_not_sent": "a message marked `sent` that Instagram never accepted in that form",
    "leaked_hold": "tokens still held after all tasks ended",
    "mismatched_balance": "a balance that is not the sum of the log",
    "drift": "a counter that is wrong after a reconcile pass",
    "lost_task": "a task that began and never ended, though Redis was not emptied",
    "lost_result": "finished work without a result, though its answers were kept to compute it again",
    "message_flood": "multiplied messages: the broker holds more messages than were sent",
    "worker_crash": "a worker that exited by itself",
}

# The ways in which a task ends, with or without a result.
DONE, NO_RESULT, UNFINISHED, WAITING, REJECTED = "done", "no result", "unfinished", "waits for its retry", "Reject"
UNENDED = (NO_RESULT, UNFINISHED, WAITING, REJECTED)


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A violated invariant. `tokens`: the number of tokens concerned, 0 if it is not about tokens."""

    kind: str
    detail: str
    tokens: int = 0
