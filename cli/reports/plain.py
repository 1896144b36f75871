"""Reports as JSON and CSV, written row by row in constant memory."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from trueup.reports.history import RunFigures
from trueup.reports.rows import ReportRow
from trueup.reports.run_report import DriftReport

ROW_COLUMNS = tuple(field.name for field in fields(ReportRow))
RUN_COLUMNS = ("run_id", *(field.name for field in fields(RunFigures) if field.name != "id"), "tokens_drifted")

# A spreadsheet runs a cell that begins with one of these as a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def report_json(report: DriftReport, rows: Iterable[ReportRow]) -> Iterator[str]:
    """Yield the report as JSON with these `rows`, one in a line."""
    head = json.dumps(report.summary_json(), indent=2, ensure_ascii=False)
    yield head.removesuffix("\n}") + ',\n  "rows": ['
    separator = "\n    "
    for row in rows:
        yield separator + json.dumps(row.as_json(), ensure_ascii=False)
        separator = ",\n    "
    yield "\n  ]\n}\n"


def report_csv(rows: Iterable[ReportRow]) -> Iterator[str]:
    """Yield the rows as CSV with a heading."""
    yield _line(ROW_COLUMNS)
    for row in rows:
        yield _line([getattr(row, name) for name in ROW_COLUMNS])


def history_csv(runs: Iterable[RunFigures]) -> Iterator[str]:
    """Yield the runs as CSV with a heading."""
    yield _line(RUN_COLUMNS)
    for run in runs:
        content = run.as_json()
        yield _line([content[name] for name in RUN_COLUMNS])


def _line(values: Sequence[Any]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow([_cell(value) for value in values])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Return a cell: numbers as they are; an apostrophe marks a text that a spreadsheet would run."""
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
