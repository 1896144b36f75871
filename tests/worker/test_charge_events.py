"""A worker that dies between a charge's commit and the host's function loses no charge."""

from pathlib import Path

import pytest

from tests.support import model_tasks
from tests.support.charge_callbacks import TOLD_VARIABLE, told
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import close_connections, own_application, running_worker
from tests.worker.conftest import TASKS
from trueup.tasks import upkeep


def test_the_host_is_told_of_a_charge_whose_process_was_killed_before_the_function_could_write(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOLD_VARIABLE, str(tmp_path / "told.jsonl"))
    monkeypatch.setenv("TRUEUP_ON_CHARGE", "tests.support.charge_callbacks.die_at_first")
    user = host.subscriber(10_000)
    app = own_application()
    app.control.purge()
    with running_worker(tmp_path / "worker.log", queues=("trueup-ai", "trueup-reconcile"), include=(TASKS,)) as worker:
        pool = {process.pid for process in worker.pool()}
        model_tasks.spend.delay(user_id=user, seconds=0)
        wait_for((tmp_path / "told.died").exists, "the process is killed in the function")
        wait_for(lambda: pool - {process.pid for process in worker.pool()}, "the pool has lost the process")
        charges = host.execute("SELECT log_id, tokens_total FROM trueup.charge").all()
        assert [(key, tokens, told()) for key, tokens in charges] == [(charges[0].log_id, host.used(user), [])]
        # The dead process has claimed the event. Its claim ends now instead of in half a minute.
        assert host.value("UPDATE trueup.charge_event SET due_at = charged_at RETURNING tries") == 1
        answer = upkeep.deliver_charge_events.apply_async(queue="trueup-reconcile").get(timeout=DEADLINE_SECONDS)
        assert answer == {"delivered": 1, "failed": 0}
        assert [(event["key"], event["total_tokens"], event["user_id"]) for event in told()] == [
            (charges[0].log_id, charges[0].tokens_total, user)
        ]
        assert host.value("SELECT count(*) FROM trueup.charge_event") == 0
    close_connections(app)
