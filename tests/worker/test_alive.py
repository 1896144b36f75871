"""The file by which a health check sees that a worker lives."""

import os
import socket
import subprocess

from tests.support.waiting import wait_for
from tests.support.worker import WorkerProcess
from trueup.worker.alive import alive_file


def is_alive(folder: str) -> bool:
    """Ask as the health checks of the deployments do."""
    check = f"find {folder} -name '*.alive' -mmin -1 | grep -q ."
    return subprocess.run(["/bin/sh", "-c", check], check=False).returncode == 0


def test_a_health_check_sees_a_living_worker_and_notices_a_dead_one(worker: WorkerProcess) -> None:
    path = alive_file(f"celery@{socket.gethostname()}")
    wait_for(path.exists, "the worker has touched its file")
    os.utime(path, (0, 0))
    wait_for(lambda: is_alive(str(path.parent)), "the worker touches the file again")
    worker.kill()
    os.utime(path, (0, 0))
    assert not is_alive(str(path.parent))
