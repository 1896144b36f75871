"""Pools of greenlets are refused when a worker starts. The other pools run metered tasks."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.host import Host
from tests.support.model_tasks import spend
from tests.support.waiting import DEADLINE_SECONDS
from tests.support.worker import close_connections, own_application, running_worker
from tests.worker.conftest import TASKS

GREEN = os.environ.get("TRUEUP_TEST_GREENLETS", "")
"""A folder with the packages eventlet and gevent, if they are not installed. No setting: it is read at import."""


@pytest.mark.parametrize("pool", ["eventlet", "gevent"])
def test_a_pool_of_greenlets_is_refused_with_the_reason(pool: str, database: str) -> None:
    path = [*filter(None, [GREEN])]
    if not path and importlib.util.find_spec(pool) is None:
        pytest.skip(f"NOT TESTED: no {pool} here; install it, or name its folder in TRUEUP_TEST_GREENLETS")
    celery = Path(sys.executable).with_name("celery")
    done = subprocess.run(
        [celery, "-A", "trueup.worker", "worker", "-Q", "trueup-ai", "-P", pool],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode != 0
    assert f"its pool is {pool}" in done.stderr
    assert "--pool prefork, threads or solo" in done.stderr


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools_run_metered_tasks(pool: str, host: Host, tmp_path: Path) -> None:
    users = [host.subscriber(1_000) for _ in range(4)]
    app = own_application()
    app.control.purge()
    with running_worker(tmp_path / "worker.log", include=(TASKS,), more=("-P", pool)):
        results = [spend.delay(user_id=user) for user in users]
        assert [result.get(timeout=DEADLINE_SECONDS) for result in results] == [host.used(user) for user in users]
    close_connections(app)
