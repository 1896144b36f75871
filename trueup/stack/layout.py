"""The folders of the embedded stack: data, sockets, locks and logs.

Everything is in the home folder. Only sockets move to the system's folder for temporary files, if the home's path is
too long for a socket or would need quoting in a URL.
"""

import hashlib
import json
import os
import re
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trueup.settings.settings import Settings
from trueup.stack.errors import StackError, explained
from trueup.stack.processes import Account

# Linux allows 107 bytes for a socket's path, macOS 103.
_MAX_SOCKET_PATH = 103
_MAX_SOCKET_NAME = len("/postgres/.s.PGSQL.5432")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")
_MAX_LOG_BYTES = 5 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The folders of one home. All paths are absolute."""

    home: Path

    @property
    def run(self) -> Path:
        """Locks, the stack file and process records."""
        return self.home / "run"

    @property
    def log(self) -> Path:
        return self.home / "log"

    def log_file(self, service: str) -> Path:
        return self.log / f"{service}.log"


def prepare_layout(settings: Settings) -> Layout:
    """Make the home's folders and return them. Raises `StackError`."""
    layout = Layout(home=settings.home)
    with explained("The embedded stack", layout.home):
        make_folder(layout.home, passable=True)
        make_folder(layout.run, passable=True)
        owner = layout.run.stat().st_uid
        if owner != os.geteuid():
            raise StackError(
                "The embedded stack",
                str(layout.home),
                f"it belongs to another user (#{owner}), who could not use it after a run as this user",
                "Run trueup as that user, or set TRUEUP_HOME to another folder.",
            )
        make_folder(layout.log)
    return layout


def make_folder(folder: Path, *, passable: bool = False) -> None:
    """Make `folder`, private to this user. An existing folder keeps its mode, because others may use it.

    `passable`: if this process is root, other users may pass through the folder but not list it. Root runs PostgreSQL
    as another user.
    """
    if folder.is_dir():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if passable and os.geteuid() == 0:
        folder.chmod(0o711)


def can_pass(path: Path, account: Account) -> bool:
    """Return whether `account` may enter the folder (or run the program) `path` and all folders above it."""
    real = path.resolve()
    return all(_may_execute(step.stat(), account) for step in (*real.parents, real))


def _may_execute(status: os.stat_result, account: Account) -> bool:
    if status.st_uid == account.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == account.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def socket_folder(base: Path, service: str, account: Account | None = None) -> Path:
    """Make and return a folder of mode 0700 for the sockets of `service`, with a path short enough.

    It belongs to `account` (None: this user). It is below `base` if the path allows, else below the folder for
    temporary files.
    """
    length = len(os.fsencode(base)) + _MAX_SOCKET_NAME
    if length > _MAX_SOCKET_PATH or not _PLAIN_PATH.fullmatch(str(base)):
        base = _temporary_base(base)
    folder = base / service
    with explained(service, folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if account and folder.stat().st_uid != account.uid:
            os.chown(folder, account.uid, account.gid)
    return folder


def _temporary_base(base: Path) -> Path:
    """Make and return a temporary folder of this user, named by a hash of `base`."""
    digest = hashlib.sha256(os.fsencode(base)).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"trueup-{os.geteuid()}-{digest}"
    with explained("The socket folder", folder):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        refuse_foreign_folder(folder)
        if os.geteuid() == 0:
            folder.chmod(0o711)  # the server's user must pass through
    return folder


def refuse_foreign_folder(folder: Path) -> None:
    """Raise `StackError` unless `folder` is a real folder of this user that no other user can write to.

    In a folder that all users can write to, another user may have made a link or a folder with our name.
    """
    status = folder.lstat()
    if (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        return
    raise StackError(
        "The embedded stack",
        str(folder),
        "this folder was made by someone else, so trueup does not use it",
        "Remove it, or set TRUEUP_HOME to a folder with a shorter path.",
    )


def rotate_log(log: Path) -> None:
    """Rename `log` when it is larger than 5 MiB, and keep one older log, so that logs never fill the disk."""
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))


def log_tail(log: Path, lines: int = 8) -> str:
    """Return the last lines of `log` for an error message, or "" if there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.strip().splitlines()[-lines:])


def replace_json(path: Path, content: object) -> None:
    """Replace a file by `content` as JSON, with mode 0600. The rename is atomic: a reader never sees half a file."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.stem}-", dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)
    os.replace(name, path)
