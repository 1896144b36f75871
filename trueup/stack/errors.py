"""The errors of the embedded stack, each with a remedy."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trueup.errors import TrueupError

_OTHER_OWNER = "Another user owns it. Run trueup as that user, or set TRUEUP_HOME to another folder."
_REMEDIES = {
    errno.ENOSPC: "Free some disk space, then try again. No committed data is lost.",
    errno.EDQUOT: "The disk quota is used up. Free some space, then try again.",
    errno.EROFS: "The folder is read-only. Set TRUEUP_HOME to a folder that you can write to.",
    errno.EACCES: _OTHER_OWNER,
    errno.EPERM: _OTHER_OWNER,
    errno.ENOTDIR: "A part of the path is a file. Remove the file, or set TRUEUP_HOME to another folder.",
}


class StackError(TrueupError):
    """An embedded server cannot run. Committed data is unchanged."""

    def __init__(self, service: str, where: str, cause: str, remedy: str) -> None:
        self.service = service
        self.where = where
        self.cause = cause
        self.remedy = remedy
        super().__init__(service, where, cause, remedy)  # Exception needs the arguments for pickling

    def __str__(self) -> str:
        return f"{self.service} in {self.where}: {self.cause.rstrip('.')}. {self.remedy}"


class StackAlreadyRunningError(StackError):
    """Another `trueup up` runs in this home. Nothing was started. `pid` is None when it is unknown."""

    def __init__(self, home: str, pid: int | None) -> None:
        self.pid = pid
        cause = f"{f'process {pid}' if pid else 'another process'} already runs the stack"
        stop = f"`kill {pid}`" if pid else "SIGTERM"
        remedy = f"Stop that process first (Ctrl-C in its terminal, or {stop}), or use another TRUEUP_HOME."
        StackError.__init__(self, "trueup up", home, cause, remedy)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.where, self.pid)


class ChildFailedError(StackError):
    """A process of the stack died too often, so `trueup up` stopped the whole stack."""


@contextmanager
def explained(service: str, where: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StackError` with cause and remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "Correct the cause, or set TRUEUP_HOME to another folder.")
        place = error.filename if isinstance(error.filename, str) else str(where)
        raise StackError(service, place, error.strerror or str(error), remedy) from error
