"""What a worker's log says of a task, and what it must not say."""

from celery import Celery

from tests.support.host import Host
from tests.support.model_tasks import answering
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import WorkerProcess


def test_a_tasks_end_is_logged_without_its_result(app: Celery, shared_host: Host, worker: WorkerProcess) -> None:
    user = shared_host.subscriber(1_000)
    sent = answering.apply_async(kwargs={"user_id": user})
    assert sent.get(timeout=DEADLINE_SECONDS) == "ran"
    ended = f"Task test.answering[{sent.id}] succeeded"
    wait_for(lambda: ended in worker.output, "the task's end is logged")
    [line] = [line for line in worker.output.splitlines() if ended in line]
    assert line.endswith("(result not logged)")
    assert "'ran'" not in worker.output
