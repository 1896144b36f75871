"""A drift report as one HTML page without external parts. The page sends no request and runs no data of the host."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from trueup.cli.reports.figures import filter_of, title_of
from trueup.drift.causes import ACTION_SENTENCES, CERTAINTY_SENTENCES
from trueup.reports.chart import chart_of
from trueup.reports.display import compact, count_of, percent, show
from trueup.reports.evidence import component_sentences, figure_sentences
from trueup.reports.history import RunFigures
from trueup.reports.pages import STYLE, environment, integrity, read_part
from trueup.reports.run_report import DriftReport
from trueup.reports.systemic import REMEDIES, sentence_of
from trueup.reports.uncredited import REMEDY

_PACKAGE = "trueup.cli.reports"


def report_html(report: DriftReport, runs: Sequence[RunFigures]) -> Iterator[str]:
    """Yield the page. `runs`: the runs in its chart, oldest first."""
    style, script = read_part("trueup.reports", STYLE), read_part(_PACKAGE, "page.js")
    # Jinja escapes everything. The policy allows only this script and style, in case an escape is missing.
    policy = f"default-src 'none'; style-src '{integrity(style)}'; script-src '{integrity(script)}'; base-uri 'none'"
    template = environment(_PACKAGE).get_template("page.html.jinja")
    yield (
        template.render(
            policy=policy,
            style=style,
            script=script,
            title=title_of(report),
            subtitle=_subtitle(report),
            tiles=_tiles(report),
            report=report,
            chart=chart_of([run for run in runs if run.only_user is None], report.run_id),
            causes=share_bars([(c.tokens_overstated, c.tokens_understated) for c in report.causes]),
            actions=share_bars([(drifts, 0) for drifts in report.actions.values()]),
            sizes=share_bars([(s.overstated, s.understated) for s in report.sizes]),
            size_label=_size_label,
            systemic_sentence=sentence_of,
            remedies=REMEDIES,
            pack_remedy=REMEDY.replace("`", ""),
            action_sentence=_action_sentence,
            certainty_sentence=lambda certainty: CERTAINTY_SENTENCES.get(certainty, certainty),
            zip=zip,
            sentence=lambda words: words[:1].upper() + words[1:],
            component_sentences=component_sentences,
            figure_sentences=figure_sentences,
            stamp=lambda moment: moment.timestamp() if isinstance(moment, datetime) else 0,
        )
    )


def _action_sentence(action: str) -> str:
    return ACTION_SENTENCES.get(action, action).replace("`", "")


def _tiles(report: DriftReport) -> list[dict[str, Any]]:
    """Return the tiles of the summary: label, figure, note and colour."""
    drifted = percent(report.counters_drifted / report.counters) if report.counters else "–"
    drift = report.tokens_drifted
    certain = f"{compact(report.tokens_proven)} proven · {compact(report.tokens_inferred)} inferred"
    tiles: list[dict[str, Any]] = [
        _tile(
            "Counters checked",
            report.counters,
            f"each in up to {count_of(report.runs, 'run')}" if report.since else f"{report.kind} pass",
        ),
        _tile(
            "Counters drifted",
            report.counters_drifted,
            f"{drifted} · {count_of(report.drifted, 'drift')}, {report.found_new:,} new",
        ),
        _tile("Corrected", report.corrected, "by compare-and-set"),
        _tile("In review", report.in_review, "wait for a person", "attention" if report.in_review else ""),
        _tile("Tokens overstated", report.tokens_overstated, "shown, but used up", "over"),
        _tile("Tokens understated", report.tokens_understated, "left, but not shown", "under"),
        _tile("Tokens explained", report.tokens_explained, certain)
        | {"figure": percent(report.share_explained), "full": f"{report.tokens_explained:,} of {drift:,}"},
    ]
    if report.defects:
        tiles.append(_tile("Defects", report.defects, "in balances or triggers", "attention"))
    return tiles


def _tile(label: str, count: int, note: str, kind: str = "") -> dict[str, Any]:
    return {"label": label, "figure": compact(count), "full": f"{count:,}", "note": note, "kind": kind}


def _subtitle(report: DriftReport) -> str:
    if report.since is not None:
        parts = [count_of(report.runs, "run"), f"until {show(report.finished_at)} UTC" if report.finished_at else ""]
    else:
        parts = [f"{show(report.started_at)} UTC", f"{report.kind} pass", report.status]
        if report.finished_at:
            parts[-1] += f" in {(report.finished_at - report.started_at).total_seconds():,.1f} s"
    if filter_of(report):
        parts.append(f"only {filter_of(report)}")
    return " · ".join(part for part in parts if part)


def _size_label(at_least: int) -> str:
    """Return an order of magnitude as a range: 1–9, 10–99, …, 10–99 k."""
    if at_least >= 10_000:
        for unit, size in (("tn", 10**12), ("bn", 10**9), ("M", 10**6), ("k", 10**3)):
            if at_least >= size:
                return f"{at_least // size:,}–{at_least // size * 10 - 1:,} {unit}"
    return f"{at_least:,}–{at_least * 10 - 1:,}"


def share_bars(pairs: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """Return the two widths of each bar, in percent of the longest bar."""
    longest = max((over + under for over, under in pairs), default=0) or 1
    return [(round(over / longest * 100, 2), round(under / longest * 100, 2)) for over, under in pairs]
