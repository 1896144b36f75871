"""A drift report as Markdown, for an issue or a chat."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from billing.cause_texts import cause_sentence, cause_title
from billing.drift_reports import DriftReport
from cli.output import show
from cli.reports.figures import summary_of, title_of

# What Markdown or HTML would take for its own: a user's id may hold anything.
_SPECIAL = re.compile(r"([\\`*_\[\]|<>&~])")


def report_markdown(report: DriftReport) -> Iterator[str]:
    """Yield the report with the rows that it has."""
    yield f"# {_cell(title_of(report))}\n\n"
    yield from _table(("", ""), list(summary_of(report).items()))
    if report.causes:
        yield "\n## Causes\n\n"
        yield from _table(
            ("cause", "drifts", "tokens overstated", "tokens understated", "meaning"),
            [
                (cause_title(c.cause), c.drifts, c.tokens_overstated, c.tokens_understated, cause_sentence(c.cause))
                for c in report.causes
            ],
        )
    if report.rows:
        yield "\n## Largest drifts\n\n" if report.rows_left_out else "\n## Drifts\n\n"
        yield from _table(
            ("user", "observed", "expected", "drift", "cause", "certainty", "action"),
            [
                (str(r.user_id), r.observed, r.expected, r.drift, cause_title(r.cause), r.certainty, r.action)
                for r in report.rows
            ],
        )
    if report.rows_left_out:
        yield f"\nAnd {report.rows_left_out:,} smaller ones.\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    numeric = [
        all(row[column] is None or isinstance(row[column], int) for row in rows) for column in range(len(headings))
    ]
    yield "| " + " | ".join(headings) + " |\n"
    yield "| " + " | ".join("---:" if number else "---" for number in numeric) + " |\n"
    for row in rows:
        yield "| " + " | ".join(_cell(value) for value in row) + " |\n"


def _cell(value: Any) -> str:
    return _SPECIAL.sub(r"\\\1", show(value))
