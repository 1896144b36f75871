"""Metered tasks that run out of memory. A worker registers them with `-I tests.support.memory_tasks`."""

import os
import resource
import signal
from pathlib import Path

from tests.support.model_tasks import ask
from trueup.accounts.user_ids import UserId
from trueup.llm.model import Model
from trueup.tasks import metered_task


@metered_task(name="test.exhausting", feature_name="Exhausting", section="chat", estimated_tokens=100)
def exhausting(model: Model, user_id: UserId) -> None:
    """Spend, then ask for more memory than the process may have."""
    ask(model, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, hard))
    try:
        bytearray(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@metered_task(
    name="test.killed",
    feature_name="Killed",
    section="chat",
    estimated_tokens=100,
    max_retries=1,
    default_retry_delay=0,
)
def killed(model: Model, user_id: UserId) -> None:
    """Spend, then die as a process does that the kernel's out-of-memory killer chooses."""
    ask(model, 10)
    os.kill(os.getpid(), signal.SIGKILL)
