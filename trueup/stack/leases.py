"""Leases: a server runs while at least one living process uses it. The stack file names the running servers.

Each service has two lock files in `run/`. A process holds `<service>.mutex` exclusively while it starts or stops the
server. Every process that uses the server holds `<service>.users` shared; the kernel releases that when the process
dies.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trueup.stack.errors import explained
from trueup.stack.layout import replace_json
from trueup.stack.locks import FileLock, mutex
from trueup.stack.processes import deferred_signals
from trueup.stack.servers.server import Server

_KEYS = {"postgres": "database_url", "redis": "broker_url"}


class Lease:
    """This process's use of one server. `find_server` makes the server's folders and returns it, not yet started.

    `run` is the folder of the lock files, `stack_file` the path of the stack file.
    """

    def __init__(self, service: str, find_server: Callable[[], Server], run: Path, stack_file: Path) -> None:
        self.service = service
        self._find_server = find_server
        self._stack_file = stack_file
        self._mutex = run / f"{service}.mutex"
        self._users = FileLock(run / f"{service}.users")
        self._server: Server | None = None

    def acquire(self) -> str:
        """Adopt or start the server and return its URL. Raises `StackError`, and then holds nothing."""
        try:
            with mutex(self._mutex, self.service):
                # Before the start, so that `release` stops the server if the start is interrupted.
                self._users.try_shared()
                self._server = self._find_server()
                self._server.ensure_running()
                publish(self._stack_file, self.service, self._server.url())
                return self._server.url()
        except BaseException:
            self.release()
            raise

    def revive(self) -> bool:
        """Restart the server if it has died. Return whether it had. Raises `StackError`."""
        # Look for its processes, because a busy server answers late but is not dead.
        if self._server is None or self._server.processes():
            return False
        with mutex(self._mutex, self.service):
            self._server.ensure_running()
        return True

    def release(self) -> None:
        """Stop the server if no other process uses it. Do nothing if this process does not hold the lease."""
        if not self._users.held:
            return
        with deferred_signals(), mutex(self._mutex, self.service):
            # A process takes the shared lock only under the mutex. So if we get the exclusive lock, there is no other
            # user, and none comes before the server has stopped.
            try:
                if self._users.try_exclusive() and self._server:
                    publish(self._stack_file, self.service, None)
                    self._server.stop()
            finally:
                self._users.release()


def publish(path: Path, service: str, url: str | None) -> None:
    """Write the URL of a started server to the stack file. None removes it, before the server stops.

    Other processes of the home read the file. It names exactly the embedded servers that run, and does not exist when
    none runs.
    """
    # The services have separate mutexes, so two processes may come here at once. A third mutex prevents that one of
    # their changes is lost.
    with mutex(path.with_suffix(".mutex"), "stack"), explained("stack", path):
        urls: dict[str, str | None] = {}
        with suppress(OSError, json.JSONDecodeError):
            urls = json.loads(path.read_text())
        urls[_KEYS[service]] = url
        if any(urls.values()):
            replace_json(path, {name: value for name, value in urls.items() if value})
        else:
            path.unlink(missing_ok=True)
