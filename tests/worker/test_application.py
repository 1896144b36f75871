"""A host that imports trueup's applications keeps its own current application and its own logs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from trueup.stack import StackUrls

IMPORTS = "import trueup.worker.celery, trueup.worker.http, trueup.cli.client"

# A host's own module: its application, a shared task and, as in a web server, a thread of its own that sends it.
HOST = """
from threading import Thread
from celery import Celery, current_app, shared_task
{before}
app = Celery("host", broker="redis://127.0.0.1:1/7")
{after}
@shared_task
def add(a, b):
    return a + b

def look():
    found.append((current_app.main, add.app.main, add.app.conf.broker_url))

found = []
look()
thread = Thread(target=look)
{in_thread}
print(found)
"""
MINE = ("host", "host", "redis://127.0.0.1:1/7")


def run(script: str, folder: Path, *arguments: str, **variables: str) -> str:
    """Run a script in its own process, without trueup's settings. Returns its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRUEUP_")}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_host_that_imports_trueup_keeps_its_current_application(tmp_path: Path) -> None:
    script = HOST.format(before="", after=IMPORTS, in_thread="")
    assert run(script, tmp_path) == str([MINE])


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_django_project_keeps_its_default_application_in_every_thread(place: str, tmp_path: Path) -> None:
    """Celery makes the first application of a Django process the default for its threads."""
    (tmp_path / "host_settings.py").write_text("INSTALLED_APPS = []\nUSE_TZ = True\n")
    imports = {"before": "", "after": ""} | {place: "import trueup.worker.celery, trueup.cli.client"}
    script = HOST.format(**imports, in_thread="thread.start(); thread.join()")
    assert run(script, tmp_path, DJANGO_SETTINGS_MODULE="host_settings") == str([MINE, MINE])


FROZEN = """
import gc
from types import SimpleNamespace
from celery import Celery
from celery.signals import celeryd_after_setup
from trueup.worker.celery import app
for application in (Celery("host"), app):
    celeryd_after_setup.send(sender="node", instance=SimpleNamespace(app=application), conf=None)
    print(gc.get_freeze_count() > 10_000)
"""


def test_only_trueup_s_own_worker_leaves_its_imports_out_of_garbage_collection(tmp_path: Path) -> None:
    assert run(FROZEN, tmp_path).split() == ["False", "True"]


HANDLERS = """
import logging, trueup.worker.celery
from celery import Celery
{application}.log.setup(loglevel="INFO")
print([type(handler.formatter).__module__ for handler in logging.getLogger().handlers])
"""


@pytest.mark.parametrize(
    ("application", "module"), [("Celery('host')", "celery."), ("trueup.worker.celery.app", "trueup.worker.logs")]
)
def test_only_trueups_own_worker_logs_as_trueup(application: str, module: str, tmp_path: Path) -> None:
    settings = {"TRUEUP_BROKER_URL": "redis://127.0.0.1:1/0"}
    assert run(HANDLERS.format(application=application), tmp_path, **settings).startswith(f"['{module}")


SHOP = """
import sys
from threading import Thread
from celery import Celery
from trueup import metered_task
import trueup.worker.celery
from trueup.errors import SettingsError
broker, others = sys.argv[1], int(sys.argv[2])
apps = [Celery(f"shop{number}", broker=broker) for number in range(1 + others)]

@metered_task(name="shop.summarize", feature_name="Summaries", section="chat", estimated_tokens=1, queue="shop-threads")
def summarize(model, user_id): ...

def send():
    try:
        summarize.delay(user_id=1)
        found.append(summarize.app.main)
    except SettingsError as error:
        found.append(str(error))

found = []
thread = Thread(target=send)
thread.start()
thread.join()
print(*found)
"""


@pytest.fixture
def waiting(stack: StackUrls) -> Iterator[Callable[[], int]]:
    """Return how many messages wait in the shop's queue."""
    assert stack.broker_url is not None
    with Redis.from_url(stack.broker_url.replace("redis+socket", "unix")) as redis:
        redis.delete("shop-threads")
        yield lambda: int(redis.llen("shop-threads"))  # type: ignore[arg-type]
        redis.delete("shop-threads")


def test_a_thread_sends_a_metered_task_by_the_hosts_application_that_is_no_default(
    stack: StackUrls, waiting: Callable[[], int], tmp_path: Path
) -> None:
    assert run(SHOP, tmp_path, str(stack.broker_url), "0") == "shop0"
    assert waiting() == 1


def test_a_thread_that_can_not_know_the_application_is_told_what_to_call(
    stack: StackUrls, waiting: Callable[[], int], tmp_path: Path
) -> None:
    told = run(SHOP, tmp_path, str(stack.broker_url), "1")
    assert "several are known here: 'shop0', 'shop1'. Call app.set_default()" in told
    assert waiting() == 0
