"""The findings of checks, and `run_check`, which turns a failed check into a finding."""

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
    """The result of a check. `check`: a stable name for machines. `remedy` None: nothing needs to be done.

    `detail`: figures and names for machines; times in seconds, tokens as counts.
    """

    check: str
    level: Level
    what: str
    remedy: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)


def ok(check: str, what: str, **detail: Any) -> Finding:
    return Finding(check=check, level="ok", what=what, detail=detail)


def warning(check: str, what: str, remedy: str, **detail: Any) -> Finding:
    return Finding(check=check, level="warning", what=what, remedy=remedy, detail=detail)


def error(check: str, what: str, remedy: str, **detail: Any) -> Finding:
    return Finding(check=check, level="error", what=what, remedy=remedy, detail=detail)


def run_check(check: str, check_function: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings of a check. A failure is a finding too: a warning after a timeout, else an error."""
    found: list[Finding] = []
    try:
        found.extend(check_function())
    except Exception as failure:  # noqa: BLE001 - the other checks must still run
        if isinstance(failure, DBAPIError) and isinstance(failure.orig, QueryCanceled):
            remedy = "Run doctor again when the database has less load."
            found.append(warning(check, "Unknown: the check took too long.", remedy))
        else:
            cause = reason_of(failure) if isinstance(failure, DBAPIError | TrueupError) else repr(failure)[:500]
            found.append(error(check, f"Unknown: the check failed ({cause}).", "Fix the cause and run doctor again."))
    return found


def exit_code(findings: Iterable[Finding], *, strict: bool) -> int:
    """Return 1 if there is an error, else 0. `strict`: a warning counts as an error."""
    wrong = ("warning", "error") if strict else ("error",)
    return int(any(finding.level in wrong for finding in findings))
