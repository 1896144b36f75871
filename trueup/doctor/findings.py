"""What checks find, and running them so that one that fails hides no other."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from psycopg.errors import QueryCanceled
from sqlalchemy.exc import DBAPIError

from trueup.database.driver_errors import reason_of
from trueup.errors import TrueupError

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found. `check`: its lasting name. `remedy` None: nothing is to be done.

    `detail`: figures and names for machines; times in seconds, tokens as counts.
    """

    check: str
    level: Level
    what: str
    remedy: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)


Check = Callable[[], Iterable[Finding]]


def ok(check: str, what: str, **detail: Any) -> Finding:
    return Finding(check=check, level="ok", what=what, detail=detail)


def warning(check: str, what: str, remedy: str, **detail: Any) -> Finding:
    return Finding(check=check, level="warning", what=what, remedy=remedy, detail=detail)


def error(check: str, what: str, remedy: str, **detail: Any) -> Finding:
    return Finding(check=check, level="error", what=what, remedy=remedy, detail=detail)


def run_check(check: str, check_function: Check) -> list[Finding]:
    """Return what a check finds; that it failed, if it did: a warning if it only took too long."""
    found: list[Finding] = []
    try:
        found.extend(check_function())
    except Exception as failure:  # noqa: BLE001 - whatever it is, the other checks have something to say
        if isinstance(failure, DBAPIError) and isinstance(failure.orig, QueryCanceled):
            found.append(
                warning(check, "Not known: looking took too long.", "Look again when the database has less to do.")
            )
        else:
            cause = reason_of(failure) if isinstance(failure, DBAPIError | TrueupError) else repr(failure)[:500]
            found.append(
                error(check, f"Not known: looking failed ({cause}).", "Mend what the cause names, and look again.")
            )
    return found


def exit_code(findings: Iterable[Finding], *, strict: bool) -> int:
    """Return 1 if anything is wrong, else 0. `strict`: a warning is wrong too."""
    wrong = ("warning", "error") if strict else ("error",)
    return int(any(finding.level in wrong for finding in findings))
