"""What the options of `trueup drift` take: moments, causes, counts of rows, files."""

import difflib
import os
import re
import secrets
import stat
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

from trueup.cli.context import Parsed, parse_moment
from trueup.drift.causes import CAUSE_SENTENCES, Cause
from trueup.errors import TrueupError

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_MAX_BACK = timedelta(days=36_500)
_BACK = re.compile(r"(\d{1,5})\s*([mhdw])", re.IGNORECASE)


def _parse_since(value: str) -> datetime | timedelta:
    back = _BACK.fullmatch(value.strip())
    if back:
        long = timedelta(**{_UNITS[back[2].lower()]: int(back[1])})
        if long > _MAX_BACK:
            raise ValueError(f"{value!r} is too far back: give at most {_MAX_BACK.days}d")
        return long
    moment = parse_moment(value, "2026-11-01, 2026-11-01T08:30+01:00, 90m, 24h, 7d or 2w")
    if moment > datetime.now(UTC):
        raise ValueError(f"{value!r} has not come yet: give a time in the past")
    return moment


def _parse_causes(value: str) -> tuple[str, ...]:
    known = set(get_args(Cause)) | set(CAUSE_SENTENCES)
    causes = tuple(part.strip().lower().replace(" ", "_").replace("-", "_") for part in value.split("+"))
    for cause in causes:
        if cause not in known:
            near = difflib.get_close_matches(cause, sorted(known), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(known))}."
            raise ValueError(f"{cause!r} is no cause. {hint}")
    return causes


def _parse_rows(value: str) -> int | str:
    if value == "all":
        return value
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise ValueError(f'{value!r} is no count of rows: give a whole number, or "all"')
    return int(value)


SINCE = Parsed("when", _parse_since)
"""A moment, as a date or time (UTC where no offset is given), or how long back: 90m, 24h, 7d, 2w."""

CAUSE = Parsed("cause", _parse_causes)
"""A cause, or several joined by "+": only drifts that have all of them."""

ROWS = Parsed("rows", _parse_rows)
"""A count of rows, or "all"."""


def moment_of(when: datetime | timedelta | None) -> datetime | None:
    """Return the moment that `SINCE` gave, or that lies so long back from now; None stays None."""
    return datetime.now(UTC) - when if isinstance(when, timedelta) else when


def write_file(path: Path, chunks: Iterable[str]) -> None:
    """Write a report to a file, whole or not at all: what was there stays until the new one is complete.

    A file that is replaced keeps its mode, and a link stays a link. Raises `TrueupError` if that is not possible.
    """
    try:
        if path.exists() and not path.is_file():
            # A pipe or a device can't be replaced.
            with path.open("w", encoding="utf-8", newline="") as out:
                out.writelines(chunks)
        else:
            _replace(Path(os.path.realpath(path)), chunks)
    except OSError as error:
        raise TrueupError(
            f"--output: {path} can't be written: {error.strerror or error}. "
            "Give a file in a folder that is there and that you may write to."
        ) from error


def _replace(target: Path, chunks: Iterable[str]) -> None:
    # Its name can't be known before, is short however long the other's is, and is never one that is there: what others
    # have put into the folder, a link say, is not followed. (tempfile would give it another mode than the umask's.)
    new = target.with_name(f".{secrets.token_hex(8)}.part")
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as out:
            if mode is not None:
                os.fchmod(descriptor, mode)
            out.writelines(chunks)
            out.flush()
            os.fsync(descriptor)
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
