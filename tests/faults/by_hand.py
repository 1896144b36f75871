"""What the harness's own tests make by hand: tasks, and requests to the provider."""

from tests.faults.ledger import Serving
from tests.faults.planned import Sending, Spending
from tests.faults.stages import Stage

BUDGET = 100
SENDING = Sending(
    task_id="m1",
    at=0,
    user=0,
    copies=1,
    script=("ok",),
    mode="STATIC",
    words=5,
    replies=False,
    post_script=("ok", "ok"),
)
SPENDING = Spending(
    task_id="t1",
    at=0,
    user=0,
    copies=1,
    script=("ok",),
    ways=("stream",),
    words=5,
    seconds=0,
    tokens=80,
    cap=None,
    extends=False,
)


def serve(stage: Stage, billed: int, *, asked: int = 80, task: str = "t1", user: int | None = None) -> Serving:
    serving, _ = stage.provider.ledger.open(
        task_id=task, call=1, fingerprint="x", user_id=user or stage.users[0], pid=1, asked=asked
    )
    serving.billed, serving.complete, serving.ended_at = billed, True, serving.started_at
    serving.usage_sent = True
    return serving
