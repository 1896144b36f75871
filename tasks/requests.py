"""What the worker's main process does for a metered task whose pool process was killed: give its hold back.

A killed process runs no `finally`. Without this its tokens would be held until the hold's time runs out.
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

# A container that was started again may have the name and the process ids of its predecessor. Made before the pool's
# processes are, so that they have it too.
_WORKER_LIFE = secrets.token_hex(4)


def owner_name(hostname: str, pid: int) -> str:
    """Return what a hold's owner is called: the process, of this life of its worker."""
    return f"{hostname}/{_WORKER_LIFE}:{pid}"


class MeteredRequest(Request):
    """A request that closes the hold of a task that was killed: by a hard time limit, by revoking, or for good."""

    def on_timeout(self, soft: bool, timeout: float) -> None:
        super().on_timeout(soft, timeout)
        if not soft:
            self._kill()
            self._give_back()

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        super().on_failure(self._lost_process(exc_info), send_failed_event, return_ok)
        # Of all that ends here, only a process that was lost has not closed its hold itself.
        if not self._was_lost(exc_info.exception):
            return
        if self._is_retried():
            self._tell(abandon_calls)
        else:
            self._give_back()

    def _lost_process(self, exc_info: Any) -> Any:
        """Return the error to record. Celery before 5.7 would record none for a body that ends its process."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        ended = isinstance(error, (SystemExit, KeyboardInterrupt))
        if CELERY_RETRIES_LOST_TASKS or not ended or self._already_revoked or self._already_cancelled:
            return exc_info
        try:
            raise WorkerLostError(f"The task ended its process: {error!r}.")
        except WorkerLostError:
            return ExceptionInfo()

    def _kill(self) -> None:
        """End the process now. The pool does so after this: until then it could charge a call past its hold's end."""
        if self.worker_pid is not None and self.worker_pid != os.getpid():  # other pools have no processes
            with suppress(ProcessLookupError):
                os.kill(self.worker_pid, signal.SIGKILL)

    def _was_lost(self, error: BaseException) -> bool:
        lost = (WorkerLostError, SystemExit, KeyboardInterrupt)
        cause = getattr(error, "exc", error)
        return isinstance(cause, lost) or type(cause).__name__ == "Terminated"

    def _is_retried(self) -> bool:
        """Return whether Celery retries the task after a lost process; the retry then spends from the same hold."""
        # Before 5.7 Celery knows no such retry: the task fails, and nothing spends from its hold any more.
        if not (CELERY_RETRIES_LOST_TASKS and self.task.retry_on_worker_lost):
            return False
        most = self.task.max_retries
        revoked = self._already_revoked or self._already_cancelled
        return not revoked and (most is None or self._context.retries < most)

    def _give_back(self) -> None:
        self._tell(close_abandoned_hold)

    def _tell(self, note: Callable[..., Any]) -> None:
        """Note in the database that this request's process is dead. Not known which it was: then its lease runs out."""
        if self.worker_pid is None:
            return
        owner = owner_name(self.hostname, self.worker_pid)
        try:
            arguments = self.task.parser.parse(tuple(self.args), dict(self.kwargs))
            user_id = arguments[USER_ARGUMENT]
            retrying(lambda connection: note(connection, user_id, self.id, owner=owner))
        except TrueupError as error:
            logger.warning("death of the process of task %s not noted, its hold expires: %s", self.id, error)
