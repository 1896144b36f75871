"""Advisory file locks (flock). The kernel releases a lock when the process that holds it dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trueup.stack.errors import StackError, explained
from trueup.stack.waiting import wait_until

# Python opens files close-on-exec, so a server or worker does not inherit a lock and keep it. A fork without exec
# (multiprocessing) inherits the descriptors; `_forget_after_fork` closes them there.
_open_descriptors: set[int] = set()


def _forget_after_fork() -> None:
    # Only close: parent and child share one open file, so LOCK_UN in the child would also unlock the parent.
    for descriptor in _open_descriptors:
        os.close(descriptor)
    _open_descriptors.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


class FileLock:
    """One flock on one file, shared or exclusive. This process holds it until `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._owner = 0

    def try_shared(self) -> bool:
        """Take the shared lock, or downgrade to it. False: another process holds the exclusive lock."""
        return self._try(fcntl.LOCK_SH)

    def try_exclusive(self) -> bool:
        """Take the exclusive lock, or upgrade to it. False: another process holds the lock.

        A failed upgrade also loses the shared lock, because the kernel releases that first.
        """
        return self._try(fcntl.LOCK_EX)

    @property
    def held(self) -> bool:
        """Whether this process holds the lock. A fork of the holder does not."""
        return self._descriptor is not None and self._owner == os.getpid()

    def release(self) -> None:
        """Release the lock if this process holds it."""
        if self._descriptor is not None and self.held:
            _open_descriptors.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def _try(self, kind: int) -> bool:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            self._owner = os.getpid()
            _open_descriptors.add(self._descriptor)
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        return True


@contextmanager
def mutex(path: Path, service: str, timeout_seconds: float = 180.0) -> Iterator[None]:
    """Hold the exclusive lock on `path` for the block. Raises `StackError` after `timeout_seconds`.

    All work under a mutex has a deadline of its own, so a longer wait means that the holder is stopped.
    """
    lock = FileLock(path)
    try:
        with explained(service, path):
            taken = wait_until(lock.try_exclusive, timeout_seconds)
        if not taken:
            raise StackError(
                service,
                str(path),
                f"another trueup process has held this lock for {timeout_seconds:.0f} s",
                f"Find that process with `fuser -v {path}` and end it, then try again.",
            )
        yield
    finally:
        lock.release()
