"""The worker's main process releases the hold of a metered task whose pool process was killed.

A killed process runs no `finally`. Without this, its tokens would stay held until the hold expires.
"""

import logging
import os
import secrets
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Task
from celery.exceptions import WorkerLostError
from celery.worker.request import Request

from trueup.database.retry import retrying
from trueup.errors import TrueupError
from trueup.gate.holds import abandon_calls, close_abandoned_hold
from trueup.tasks.arguments import USER_ARGUMENT

logger = logging.getLogger(__name__)

CELERY_RETRIES_LOST_TASKS = hasattr(Task, "retry_on_worker_lost")

# A restarted container may have the same host name and process ids as before; this value tells the two apart. It is set
# before the pool forks, so that pool processes have the same value.
_WORKER_LIFE = secrets.token_hex(4)


def owner_name(hostname: str, pid: int) -> str:
    """Return the name of a hold's owner: a process of this run of its worker."""
    return f"{hostname}/{_WORKER_LIFE}:{pid}"


class MeteredRequest(Request):
    """A request that closes the hold of a task whose process was lost or killed, by a time limit or a revoke."""

    def on_timeout(self, soft: bool, timeout: float) -> None:
        super().on_timeout(soft, timeout)
        if not soft:
            self._kill()
            self._record(close_abandoned_hold)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        super().on_failure(self._lost_process(exc_info), send_failed_event, return_ok)
        # Every other failure has closed its hold in the pool process; only a lost process could not.
        if not self._was_lost(exc_info.exception):
            return
        if self._is_retried():
            self._record(abandon_calls)
        else:
            self._record(close_abandoned_hold)

    def _lost_process(self, exc_info: Any) -> Any:
        """Return the error to record. Celery before 5.7 records none for a body that ends its own process."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        ended = isinstance(error, (SystemExit, KeyboardInterrupt))
        if CELERY_RETRIES_LOST_TASKS or not ended or self._already_revoked or self._already_cancelled:
            return exc_info
        try:
            raise WorkerLostError(f"The task ended its process: {error!r}.")
        except WorkerLostError:
            return ExceptionInfo()

    def _kill(self) -> None:
        """Kill the process now. The pool kills it only later; until then it could charge a call to a closed hold."""
        if self.worker_pid is not None and self.worker_pid != os.getpid():  # other pools have no processes
            with suppress(ProcessLookupError):
                os.kill(self.worker_pid, signal.SIGKILL)

    def _was_lost(self, error: BaseException) -> bool:
        lost = (WorkerLostError, SystemExit, KeyboardInterrupt)
        cause = getattr(error, "exc", error)
        return isinstance(cause, lost) or type(cause).__name__ == "Terminated"

    def _is_retried(self) -> bool:
        """Return whether Celery retries the task after a lost process; the retry then spends from the same hold."""
        # Before 5.7, Celery has no such retry. The task fails, and no later attempt spends from its hold.
        if not (CELERY_RETRIES_LOST_TASKS and self.task.retry_on_worker_lost):
            return False
        most = self.task.max_retries
        revoked = self._already_revoked or self._already_cancelled
        return not revoked and (most is None or self._context.retries < most)

    def _record(self, write: Callable[..., Any]) -> None:
        """Record in the database that this request's process is dead. If its pid is unknown, the lease will expire."""
        if self.worker_pid is None:
            return
        owner = owner_name(self.hostname, self.worker_pid)
        try:
            arguments = self.task.parser.parse(tuple(self.args), dict(self.kwargs))
            user_id = arguments[USER_ARGUMENT]
            retrying(lambda connection: write(connection, user_id, self.id, owner=owner))
        except TrueupError as error:
            logger.warning(
                "Could not release the hold of a killed task; it will expire on its own. task=%s error=%s",
                self.id,
                error,
            )
