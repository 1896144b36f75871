"""A drift report as Markdown, for an issue or a chat."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from trueup.cli.output import show
from trueup.cli.reports.figures import summary_of, title_of
from trueup.drift.causes import cause_sentence, cause_title
from trueup.reports.run_report import DriftReport

# What Markdown or HTML would take for its own in words of ours.
_SPECIAL = re.compile(r"([\\`*_\[\]|<>&~])")
_BACKTICKS = re.compile("`+")


class _Verbatim(str):
    """Markdown already."""


def report_markdown(report: DriftReport) -> Iterator[str]:
    """Yield the report with the rows that it has."""
    yield f"# {_cell(title_of(report))}\n\n"
    facts = summary_of(report)
    if "only" in facts:
        facts["only"] = _as_it_is(facts["only"])
    yield from _table(("", ""), list(facts.items()))
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
                (
                    _as_it_is(str(r.user_id)),
                    r.observed,
                    r.expected,
                    r.drift,
                    cause_title(r.cause),
                    r.certainty,
                    r.action,
                )
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
    return value if isinstance(value, _Verbatim) else _SPECIAL.sub(r"\\\1", show(value))


def _as_it_is(text: str) -> _Verbatim:
    """Return what the host has written, a user's id say, so that nothing in it counts: no link, no name, no picture.

    A backslash would not do: an address or a name is found in what it leaves. In code nothing is looked for. What ends
    a cell of a table does so in code too, and stands between two pieces of it.
    """
    if text.isascii() and text.isdigit():
        return _Verbatim(text)
    return _Verbatim("&#124;".join(_code(part) for part in show(text).split("|")))


def _code(text: str) -> str:
    if not text:
        return text
    fence = "`" * (1 + max((len(run) for run in _BACKTICKS.findall(text)), default=0))
    # A space at both ends is taken off, unless there is nothing else; a backtick there would belong to the fence.
    space = " " if text.strip(" ") and (text[0] in " `" or text[-1] in " `") else ""
    return f"{fence}{space}{text}{space}{fence}"
