"""Leases: a server runs as long as at least one living process uses it, and no longer.

Two files per service in `run/`. `<service>.mutex` is held exclusively while a server is started or
stopped. `<service>.users` is held shared by every process that uses it; the kernel drops that when
the process dies.
"""

from collections.abc import Callable
from pathlib import Path

from trueup.stack.layout import Layout
from trueup.stack.locks import FileLock, mutex
from trueup.stack.processes import deferred_signals
from trueup.stack.servers.server import Server, ensure_running, stop_server
from trueup.stack.stack_file import StackFile


class Lease:
    """This process's use of one server; `find_server` makes its folders and describes it."""

    def __init__(
        self,
        service: str,
        find_server: Callable[[Layout], Server],
        layout: Layout,
        stack_file: StackFile,
    ) -> None:
        self.service = service
        self._find_server = find_server
        self._layout = layout
        self._stack_file = stack_file
        self._mutex: Path = layout.run / f"{service}.mutex"
        self._users = FileLock(layout.run / f"{service}.users")
        self._server: Server | None = None

    def acquire(self) -> str:
        """Adopt or start the server and return its URL.

        Raises `StackError`; then nothing is held.
        """
        try:
            with mutex(self._mutex, self.service):
                # Before the start, so that an interrupt during it finds the lease to give back.
                self._users.try_shared()
                self._server = self._find_server(self._layout)
                ensure_running(self._server)
                self._stack_file.publish(self.service, self._server.url())
                return self._server.url()
        except BaseException:
            self.release()
            raise

    def revive(self) -> bool:
        """Start the server again if it has died; return whether it had. Raises `StackError`."""
        # Asked for its processes and not for an answer: a busy server is slow, but not dead.
        if self._server is None or self._server.processes():
            return False
        with mutex(self._mutex, self.service):
            ensure_running(self._server)
        return True

    def release(self) -> None:
        """Stop the server if no other process uses it; without effect when the lease is not held.

        A fork of the holder does not hold it.
        """
        if not self._users.held:
            return
        with deferred_signals(), mutex(self._mutex, self.service):
            # The shared lock is taken under the mutex only. So getting the exclusive lock means
            # that there is no other user, and that none comes before the server has stopped.
            try:
                if self._users.try_exclusive() and self._server:
                    self._stack_file.withdraw(self.service)
                    stop_server(self._server)
            finally:
                self._users.release()
