"""Drifts and evidence as the database would return them, for tests of the cause engine without a database."""

from typing import Any

from tests.support.host import NOW
from trueup.drift.detect import Drift
from trueup.drift.evidence import Evidence

INT4 = 2**31 - 1
AT = "2024-11-02T12:00:00+00:00"
SOON = "2024-11-02T12:00:02+00:00"
LATER = "2024-11-02T13:00:00+00:00"


def drift(observed: int | None, expected: int, evidence: dict[str, Any] | None = None, **more: Any) -> Drift:
    values = {
        "user_id": 1,
        "subscription_id": "1",
        "is_active": True,
        "end_date": None,
        "seen_at": NOW,
        "original": 10_000,
        "consumed": 10_000 - expected,
        **more,
    }
    found = Evidence.model_validate(evidence or {})
    return Drift(observed=observed, expected=expected, evidence=found, **values)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"log_id": str(number), "tokens": 300, "created_at": AT} for number in range(count)]


def same_size(tokens: int, *, counted: int = 0, failed: int = 0) -> dict[str, Any]:
    return {
        "matches": [
            {
                "tokens": tokens,
                "counted": counted,
                "counted_rows": rows(counted),
                "failed": failed,
                "failed_rows": rows(failed),
            }
        ]
    }


def ledger(**more: Any) -> dict[str, Any]:
    return {"decrements_mapped": True, "purchases_mapped": True, "start": 10_000, **more}


def forget_journal(host: Any) -> None:
    """Let all changes of counters be unseen, as before trueup was attached: causes are inferred from the rows."""
    host.execute("DELETE FROM trueup.journal_start")


def part(kind: str, tokens: int, *, elsewhere: bool = False) -> dict[str, Any]:
    row = {"kind": "L", "id": "1", "at": AT}
    sample = {"tokens": abs(tokens), "times": 1, "rows": [row]}
    return {
        "class": kind,
        "count": 1,
        "tokens": tokens,
        "first_at": AT,
        "elsewhere": elsewhere,
        "late": False,
        "samples": [sample],
    }


def purchase(tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "id": "7",
        "reference": "t7",
        "tokens": tokens,
        "at": AT,
        "kind": "token plan",
        "own_plan": False,
        "granted": False,
        "settled": False,
        "opened_window": False,
        **more,
    }


def concurrent(lost: int, kept: int, *, overlapped: bool = False) -> dict[str, Any]:
    rows = {"lost": {"id": "1", "tokens": lost, "at": AT}, "kept": {"id": "2", "tokens": kept, "at": AT}}
    return {**rows, "overlapped": overlapped}


def overlaps(*sizes: int) -> dict[str, Any]:
    """Return decrements, some of them overwritten by a process that had read the counter before."""
    return {"concurrent": [concurrent(size, 80, overlapped=True) for size in sizes]}


def segment(number: int, *sizes: int) -> dict[str, Any]:
    newest = [{"id": str(place), "tokens": size, "at": AT} for place, size in enumerate(sizes)][::-1]
    return {"number": number, "change": -sum(sizes), "lowest": -sum(sizes), "newest": newest}


def carried(tokens: int | None, used: int, **more: Any) -> dict[str, Any]:
    return {
        "since": AT,
        "tokens": tokens,
        "used": used,
        "lowered": used,
        "payment": "3",
        "upgrade": {"id": "4", "at": AT},
        "place": 1,
        "ran_out": False,
        "same_plan": False,
        **more,
    }


def edge_row(kind: str, *, settled: bool = False, young: bool = False, at: str = AT) -> dict[str, Any]:
    return {"kind": kind, "id": kind + at, "at": at, "settled": settled, "young": young}
