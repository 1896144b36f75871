"""A worker for which no model provider is set: AI tasks fail with the reason, all other tasks run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from tests.support.host import Host
from tests.support.worker import WorkerProcess, running_worker
from trueup.cli.run import finish
from trueup.errors import SettingsError
from trueup.settings.settings import get_settings
from trueup.tasks.upkeep import expire_holds, reconcile_counters

SECONDS = 120
ARTICLE = Path(__file__).parents[2] / "examples" / "help_en.txt"


@pytest.fixture(scope="module")
def worker(app: Celery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("TRUEUP_MODEL_PROVIDER")
        get_settings.cache_clear()
        with running_worker(log, queues=("trueup-ai", "trueup-reconcile")) as worker:
            yield worker
    get_settings.cache_clear()


@pytest.mark.usefixtures("worker")
def test_an_ai_task_fails_with_an_error_that_names_the_setting_and_holds_nothing(
    app: Celery, shared_host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    user = shared_host.subscriber()
    arguments = {"user_id": user, "text": ARTICLE.read_text()}
    with pytest.raises(SettingsError, match="TRUEUP_MODEL_PROVIDER is not set"):
        app.tasks["trueup.generate_qa"].delay(**arguments).get(timeout=SECONDS)
    with pytest.raises(SystemExit) as ended:
        finish(get_settings(), "trueup.generate_qa", arguments, wait=True, timeout=SECONDS, as_json=False)
    assert ended.value.code == 1
    assert "Error: the task failed (SettingsError): TRUEUP_MODEL_PROVIDER is not set" in capsys.readouterr().err
    assert shared_host.value("SELECT count(*) FROM trueup.hold") == 0
    assert shared_host.used(user) == 0


@pytest.mark.usefixtures("worker")
def test_upkeep_and_reconciling_need_no_provider(app: Celery, shared_host: Host) -> None:
    user = shared_host.subscriber(counter=9_000)
    assert expire_holds.delay().get(timeout=SECONDS) == {"holds": 0, "tokens": 0}
    assert reconcile_counters.delay().get(timeout=SECONDS)["checked"] >= 1
    assert shared_host.counter(user) == 10_000
