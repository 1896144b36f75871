"""trueup's queues. Messages in them say when they were sent: Redis does not know."""

from datetime import UTC, datetime
from typing import Any

from celery.signals import before_task_publish

AI_QUEUE = "trueup-ai"
RECONCILE_QUEUE = "trueup-reconcile"

SENT_AT_HEADER = "trueup_sent_at"
"""Of a task's message in these queues: when it was sent, by the sender's clock, as ISO 8601 with a zone.

A retry has its own.
"""


@before_task_publish.connect(dispatch_uid="trueup-sent-at")
def _note_sent_at(headers: dict[str, Any] | None = None, routing_key: str | None = None, **_: Any) -> None:
    if headers is not None and routing_key in (AI_QUEUE, RECONCILE_QUEUE):
        headers[SENT_AT_HEADER] = datetime.now(UTC).isoformat()
