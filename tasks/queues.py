"""trueup's queues. Their messages carry the time they were sent, which Redis does not record."""

from datetime import UTC, datetime
from typing import Any

from celery.signals import before_task_publish

AI_QUEUE = "trueup-ai"
RECONCILE_QUEUE = "trueup-reconcile"

SENT_AT_HEADER = "trueup_sent_at"
"""Header with the time a message was sent: the sender's clock, ISO 8601 with a zone. A retry has its own time."""


@before_task_publish.connect(dispatch_uid="trueup-sent-at")
def _note_sent_at(headers: dict[str, Any] | None = None, routing_key: str | None = None, **_: Any) -> None:
    if headers is not None and routing_key in (AI_QUEUE, RECONCILE_QUEUE):
        headers[SENT_AT_HEADER] = datetime.now(UTC).isoformat()
