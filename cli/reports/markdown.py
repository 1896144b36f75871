"""A drift report as Markdown, for an issue or a chat."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from trueup.cli.output import count_of, numeric_columns, show
from trueup.cli.reports.figures import summary_of, title_of
from trueup.drift.causes import cause_sentence, cause_title
from trueup.reports.run_report import DriftReport
from trueup.reports.systemic import REMEDIES
from trueup.reports.uncredited import REMEDY

# In trueup's own words, Markdown or HTML would interpret these characters.
_SPECIAL = re.compile(r"([\\`*_\[\]|<>&~])")
MAX_PACKS_SHOWN = 50
_BACKTICKS = re.compile("`+")


class _Verbatim(str):
    """A text that is Markdown already."""


def report_markdown(report: DriftReport) -> Iterator[str]:
    """Yield the report, with the rows that it has."""
    yield f"# {_cell(title_of(report))}\n\n"
    facts = summary_of(report)
    if "only" in facts:
        facts["only"] = _verbatim(facts["only"])
    yield from _table(("", ""), list(facts.items()))
    if report.systemic:
        yield "\n## Systemic causes\n\n"
        yield from _table(
            ("fault", "in the", "named", "rows", "of", "users", "tokens", "since (UTC)", "remedy"),
            [
                (
                    *(cause_title(c.kind), c.dimension, _verbatim(c.name), c.count, c.of, c.users, c.tokens),
                    *(c.since, REMEDIES[c.kind]),
                )
                for c in report.systemic
            ],
        )
    if report.uncredited and report.uncredited.packs:
        yield "\n## Paid, but in neither plan, grant nor counter\n\n"
        yield f"{count_of(report.uncredited.packs, 'pack')}, {report.uncredited.tokens:,} tokens. {REMEDY}\n\n"
        yield from _table(
            ("user", "reference", "tokens", "paid (UTC)", "certainty"),
            [
                (_verbatim(str(p.user_id)), _verbatim(p.reference), p.tokens, p.paid_at, p.certainty)
                for p in report.uncredited.newest[:MAX_PACKS_SHOWN]
            ],
        )
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
                    *(_verbatim(str(r.user_id)), r.observed, r.expected, r.drift),
                    *(cause_title(r.cause), r.certainty, r.action),
                )
                for r in report.rows
            ],
        )
    if report.rows_left_out:
        yield f"\nAnd {report.rows_left_out:,} smaller drifts.\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(headings) + " |\n"
    yield "| " + " | ".join("---:" if number else "---" for number in numeric_columns(rows)) + " |\n"
    for row in rows:
        yield "| " + " | ".join(_cell(value) for value in row) + " |\n"


def _cell(value: Any) -> str:
    return value if isinstance(value, _Verbatim) else _SPECIAL.sub(r"\\\1", show(value))


def _verbatim(text: str) -> _Verbatim:
    """Return a text of the host, such as a user's id, as code, so that Markdown finds no link, mention or image in it.

    Backslashes do not suffice, because renderers still find addresses and mentions. A "|" ends a table cell even in
    code, so it stands as an entity between two pieces of code.
    """
    if text.isascii() and text.isdigit():
        return _Verbatim(text)
    return _Verbatim("&#124;".join(_code(part) for part in show(text).split("|")))


def _code(text: str) -> str:
    if not text:
        return text
    fence = "`" * (1 + max((len(run) for run in _BACKTICKS.findall(text)), default=0))
    # Renderers remove one space at both ends, and a backtick at an end would join the fence.
    space = " " if text.strip(" ") and (text[0] in " `" or text[-1] in " `") else ""
    return f"{fence}{space}{text}{space}{fence}"
