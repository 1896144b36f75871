"""The drift report of a preview: it sums figures batch by batch and keeps rows in a temporary file."""

import heapq
import pickle
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import IO, TypeVar

from trueup.preview.scan import ScanOutcome
from trueup.reconcile.runs import Finding, RunSummary
from trueup.reports.rows import DriftFilter, ReportRow, row_of_finding
from trueup.reports.run_report import DriftReport, report_dry_run
from trueup.reports.totals import SET_ASIDE, CauseFigures, SizeFigures, tally_findings

Figures = TypeVar("Figures", CauseFigures, SizeFigures)

KIND = "look"
IN_MEMORY_BYTES = 16_000_000


class PreviewReport:
    """The findings of a preview so far. In memory it keeps two numbers for each drift."""

    def __init__(self, only: DriftFilter) -> None:
        self.only = only
        self.summary = RunSummary(run_id=None, dry_run=True, started_at=datetime.now(UTC))
        self.actions: Counter[str] = Counter()
        self.causes: dict[str, CauseFigures] = {}
        self.sizes: dict[int, SizeFigures] = {}
        self._rows: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 - closed by close()
        self._tokens = array("q")
        self._places = array("q")

    def close(self) -> None:
        """Delete the temporary file with the rows."""
        self._rows.close()

    def add(self, checked: int, findings: Sequence[Finding]) -> None:
        """Add a batch: the number of counters compared, and the drifts found."""
        pairs = [(finding, row_of_finding(finding)) for finding in findings]
        chosen = [(finding, row) for finding, row in pairs if self._is_chosen(row)]
        self.summary.add(checked, [finding for finding, _ in chosen])
        rows = [row for _, row in chosen]
        self.actions.update(row.action for row in rows)
        causes, sizes = tally_findings(rows)
        for one in causes:
            self.causes[one.cause] = _sum(self.causes.get(one.cause), one, "cause")
        for size in sizes:
            self.sizes[size.at_least] = _sum(self.sizes.get(size.at_least), size, "at_least")
        for row in rows:
            self._tokens.append(abs(row.drift))
            self._places.append(self._rows.tell())
            pickle.dump(row, self._rows)

    def report(self, outcome: ScanOutcome, *, max_rows: int | None) -> DriftReport:
        """Return the report with the rows of the largest drifts; `max_rows` None: all rows, all in memory."""
        self.summary.started_at = outcome.started_at or self.summary.started_at
        self.summary.finished_at = outcome.finished_at or self.summary.started_at
        self.summary.status = "finished"
        rows = list(self.rows(max_rows))
        return replace(
            report_dry_run(self.summary),
            kind=KIND,
            filter=self.only,
            set_aside=sum(self.actions[action] for action in SET_ASIDE),
            causes=sorted(self.causes.values(), key=lambda one: (-one.tokens, one.cause)),
            sizes=self._all_sizes(),
            actions=dict(self.actions.most_common()),
            rows=rows,
            rows_left_out=self.summary.drifted - len(rows),
            systemic=outcome.systemic if self._is_about_all_causes() else None,
            uncredited=outcome.uncredited if self._is_about_all_causes() else None,
        )

    def rows(self, most: int | None = None) -> Iterator[ReportRow]:
        """Yield the rows, the largest drifts first; `most` None: all."""

        def order(number: int) -> tuple[int, int]:
            return -self._tokens[number], number

        numbers = range(len(self._tokens))
        for number in sorted(numbers, key=order) if most is None else heapq.nsmallest(most, numbers, key=order):
            self._rows.seek(self._places[number])
            row = pickle.load(self._rows)  # noqa: S301 - this process wrote it
            assert isinstance(row, ReportRow)  # noqa: S101 - for the type checker
            yield row

    def _is_about_all_causes(self) -> bool:
        return replace(self.only, user_id=None) == DriftFilter()

    def _is_chosen(self, row: ReportRow) -> bool:
        return abs(row.drift) >= self.only.min_tokens and set(self.only.causes) <= set(row.cause.split("+"))

    def _all_sizes(self) -> list[SizeFigures]:
        """Return the size classes from the smallest to the largest, with empty ones in between."""
        if not self.sizes:
            return []
        found, at_least = [], min(self.sizes)
        while at_least <= max(self.sizes):
            found.append(self.sizes.get(at_least) or SizeFigures(at_least=at_least, overstated=0, understated=0))
            at_least *= 10
        return found


def _sum(so_far: Figures | None, more: Figures, key: str) -> Figures:
    """Return the sum of two figures; `key`: the field that both share."""
    if so_far is None:
        return more
    names = [field.name for field in fields(more) if field.name != key]
    return replace(more, **{name: getattr(so_far, name) + getattr(more, name) for name in names})
