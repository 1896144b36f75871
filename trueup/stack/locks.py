"""Advisory file locks (flock): the kernel drops them when their holder dies, however it dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trueup.stack.errors import StackError, explained
from trueup.stack.waiting import wait_until

# Files are opened close-on-exec, so that no server and no worker keeps a lock alive by inheriting
# it. A fork without exec (multiprocessing) does inherit: `_forget_after_fork` closes the copies
# there.
_open_descriptors: set[int] = set()


def _forget_after_fork() -> None:
    # Close only: LOCK_UN in the child would unlock the parent, since both share one open file.
    for descriptor in _open_descriptors:
        os.close(descriptor)
    _open_descriptors.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


class FileLock:
    """One flock on one file, shared or exclusive, held by this process until `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._owner = 0

    def try_shared(self) -> bool:
        """Take or downgrade to the shared lock; False when another process holds it exclusively."""
        return self._try(fcntl.LOCK_SH)

    def try_exclusive(self) -> bool:
        """Take or upgrade to the exclusive lock; False when any other process holds the lock.

        A failed upgrade loses the shared lock: the kernel drops it first.
        """
        return self._try(fcntl.LOCK_EX)

    @property
    def held(self) -> bool:
        """Whether this process holds it; a fork of the holder does not."""
        return self._descriptor is not None and self._owner == os.getpid()

    def release(self) -> None:
        """Drop the lock; without effect when it is not held, or is our parent's (we are a fork)."""
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
    """Hold the exclusive lock on `path` for the block. Raises `StackError` when it stays taken.

    Everything done under a mutex has its own deadline, so that a wait this long means a stopped
    holder.
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
                f"Find it with `fuser -v {path}` and end it, then try again.",
            )
        yield
    finally:
        lock.release()
