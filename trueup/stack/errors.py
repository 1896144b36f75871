"""What can go wrong with the embedded stack, and what to do about it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trueup.errors import TrueupError

_REMEDIES = {
    errno.ENOSPC: "Free some disk space, then try again; nothing that was committed is lost.",
    errno.EDQUOT: "The disk quota is used up: free some space, then try again.",
    errno.EROFS: "The folder is read-only: point TRUEUP_HOME to one you can write.",
    errno.EACCES: "Another user owns it: run trueup as that user, or point TRUEUP_HOME elsewhere.",
    errno.EPERM: "Another user owns it: run trueup as that user, or point TRUEUP_HOME elsewhere.",
    errno.ENOTDIR: "A file is in the way: remove it, or point TRUEUP_HOME elsewhere.",
}


class StackError(TrueupError):
    """An embedded server cannot be run. Data already committed is untouched."""

    def __init__(self, service: str, where: str, cause: str, remedy: str) -> None:
        self.service = service
        self.where = where
        self.cause = cause
        self.remedy = remedy
        super().__init__(service, where, cause, remedy)  # the arguments, so that the error pickles

    def __str__(self) -> str:
        return f"{self.service} in {self.where}: {self.cause.rstrip('.')}. {self.remedy}"


class StackAlreadyRunningError(StackError):
    """Another `trueup up` runs in this home. Nothing was started; `pid` is None if not known."""

    def __init__(self, home: str, pid: int | None) -> None:
        self.pid = pid
        named = f"process {pid}" if pid else "another process"
        stop = f"`kill {pid}`" if pid else "SIGTERM"
        StackError.__init__(
            self,
            "trueup up",
            home,
            f"the stack is already run by {named}",
            f"Stop that one first (Ctrl-C in its terminal, or {stop}), or use another TRUEUP_HOME.",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.where, self.pid)


class ChildFailedError(StackError):
    """A process of the stack kept dying, so that the whole stack was stopped."""


@contextmanager
def explained(service: str, where: Path) -> Iterator[None]:
    """Turn an error of the operating system into a `StackError` with cause and remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "Correct it, or point TRUEUP_HOME elsewhere.")
        place = error.filename if isinstance(error.filename, str) else str(where)
        raise StackError(service, place, error.strerror or str(error), remedy) from error
