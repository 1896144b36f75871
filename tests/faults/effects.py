"""Checks of direct messages and public replies: the outbox against Instagram's own ledger."""

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tests.faults.books import Books
from tests.faults.ledger import EFFECTS, Effect
from tests.faults.violations import UNENDED, Violation

if TYPE_CHECKING:
    from tests.faults.stages import Stage


def effect_violations(stage: "Stage", books: Books) -> Iterator[Violation]:
    """Yield the messages that were sent twice, were sent without a record, or are recorded and were not sent."""
    accepted, senders = defaultdict(list), defaultdict(set)
    for posting in books.postings:
        senders[posting.comment_id, posting.effect].add(posting.pid)
        if posting.accepted:
            accepted[posting.comment_id, posting.effect].append(posting.text)
    rows = {(row.task_id, row.effect): row for row in books.effects}
    for task in stage.plan.sendings:
        outcome, result = stage.outcomes.get(task.task_id), stage.results.get(task.task_id)
        for effect in EFFECTS:
            texts, row = accepted[task.comment_id, effect], rows.get((task.task_id, effect))
            said = f"its row says {row.status}" if row else "no row of it"
            name = f"{effect} of {task.task_id} ({task.mode}, {outcome}): accepted {len(texts)} times, {said}"
            if len(texts) > 1:
                yield Violation(kind="message_sent_twice", detail=name)
            # An effect without a living sender can't be recognised by the row of a task that was lost in transport, nor
            # by that of a process that was killed while it sent, beside a duplicate that continued. It is listed when
            # its time is over.
            untellable = outcome in UNENDED or not senders[task.comment_id, effect].isdisjoint(stage.killed)
            if texts and _status(row) not in ("sent", "unknown", *(["sending"] if untellable else [])):
                yield Violation(kind="message_untold", detail=name)
            if row is not None and row.status == "sent" and row.text not in texts:
                yield Violation(kind="message_not_sent", detail=f"{name}: {row.text!r}, not {texts}")
            if _says_sent(result, effect) and not texts:
                yield Violation(kind="message_not_sent", detail=f"{name}, its result says sent")


def _status(row: Any) -> str | None:
    return row.status if row else None


def _says_sent(result: Any, effect: Effect) -> bool:
    if not isinstance(result, dict):
        return False
    return result["status"] == "sent" if effect == EFFECTS[0] else bool(result["public_reply_sent"])
