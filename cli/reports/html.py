"""A drift report as one HTML page without external parts. The page sends no request and runs no data of the host."""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from trueup.cli.output import count_of, show
from trueup.cli.reports.figures import filter_of, percent, signed, title_of
from trueup.drift.causes import ACTION_SENTENCES, CERTAINTY_SENTENCES, cause_sentence, cause_title
from trueup.reports.history import RunFigures
from trueup.reports.run_report import DriftReport
from trueup.reports.systemic import REMEDIES, sentence_of
from trueup.reports.uncredited import REMEDY

# The size of the chart in its own units. The page stretches it, so that its text stands outside.
HEIGHT = 200
SLOT = 100

_ENVIRONMENT = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)


def report_html(report: DriftReport, runs: Sequence[RunFigures]) -> Iterator[str]:
    """Yield the page. `runs`: the runs in its chart, oldest first."""
    style, script = _part("page.css"), _part("page.js")
    # Jinja escapes everything. The policy allows only this script and style, in case an escape is missing.
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'"
    template = _ENVIRONMENT.from_string(_part("page.html.jinja"))
    yield (
        template.render(
            policy=policy,
            style=style,
            script=script,
            title=title_of(report),
            subtitle=_subtitle(report),
            tiles=_tiles(report),
            report=report,
            columns=_columns([run for run in runs if run.only_user is None], report.run_id),
            causes=share_bars([(c.tokens_overstated, c.tokens_understated) for c in report.causes]),
            actions=share_bars([(drifts, 0) for drifts in report.actions.values()]),
            sizes=share_bars([(s.overstated, s.understated) for s in report.sizes]),
            size_label=_size_label,
            systemic_sentence=sentence_of,
            remedies=REMEDIES,
            pack_remedy=REMEDY.replace("`", ""),
            cause_title=cause_title,
            cause_sentence=cause_sentence,
            action_sentence=_action_sentence,
            certainty_sentence=lambda certainty: CERTAINTY_SENTENCES.get(certainty, certainty),
            zip=zip,
            sentence=lambda words: words[:1].upper() + words[1:],
            show=show,
            count_of=count_of,
            compact=compact,
            signed=signed,
            percent=percent,
            pretty=lambda evidence: json.dumps(evidence, indent=1, ensure_ascii=False),
            stamp=lambda moment: moment.timestamp() if isinstance(moment, datetime) else 0,
        )
    )


def compact(tokens: int) -> str:
    """Return a count that fits a tile: up to 9,999,999 in full, then 12.3 M, 4.5 bn, 1.0 tn."""
    for unit, size in (("tn", 10**12), ("bn", 10**9), ("M", 10**6)):
        if abs(tokens) >= max(size, 10**7):
            return f"{tokens / size:,.1f} {unit}"
    return f"{tokens:,}"


def _action_sentence(action: str) -> str:
    return ACTION_SENTENCES.get(action, action).replace("`", "")


def _tiles(report: DriftReport) -> list[dict[str, Any]]:
    """Return the tiles of the summary: label, figure, note and colour."""
    drifted = percent(report.drifted / report.checked) if report.checked else "–"
    drift = report.tokens_drifted
    certain = f"{compact(report.tokens_proven)} proven · {compact(report.tokens_inferred)} inferred"
    tiles: list[dict[str, Any]] = [
        _tile(
            "Counters checked", report.checked, f"in {report.runs:,} runs" if report.since else f"{report.kind} pass"
        ),
        _tile("Drifted", report.drifted, f"{report.found_new:,} new · {drifted} of those checked"),
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
        parts = [f"{report.runs:,} runs", f"until {show(report.finished_at)} UTC" if report.finished_at else ""]
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


def _part(name: str) -> str:
    return files("trueup.cli.reports").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """Return the hash of a style or script, as it stands between its tags, for the page's policy."""
    digest = hashlib.sha256(f"\n{content}".encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _columns(runs: Sequence[RunFigures], this_run: int | None) -> dict[str, Any]:
    """Return the chart of the runs: bars up for overstated and down for understated tokens, on one scale.

    `this_run`: the run of the report. `middle`: the zero line. `highest` and `lowest`: the tokens at top and bottom.
    """
    highest = max((run.tokens_overstated for run in runs), default=0)
    lowest = max((run.tokens_understated for run in runs), default=0)
    scale = HEIGHT / max(1, highest + lowest)
    # A chart of a few runs has narrow bars.
    bar = round(SLOT * min(0.7, 0.04 * len(runs) + 0.02), 2)
    columns = [
        {
            "run": run,
            "x": round(place * SLOT + (SLOT - bar) / 2, 2),
            "up": _visible(run.tokens_overstated, scale),
            "down": _visible(run.tokens_understated, scale),
            "is_this": run.id == this_run,
        }
        for place, run in enumerate(runs)
    ]
    middle = round(highest * scale if highest + lowest else HEIGHT / 2, 2)
    size = {"width": max(1, len(runs)) * SLOT, "height": HEIGHT, "slot": SLOT, "bar": bar}
    return {"columns": columns, "middle": middle, "highest": highest, "lowest": lowest, **size}


def _visible(tokens: int, scale: float) -> float:
    """Return the length of a bar. More than zero tokens are always visible."""
    return round(max(1.5, tokens * scale), 2) if tokens else 0.0


def share_bars(pairs: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """Return the two widths of each bar, in percent of the longest bar."""
    longest = max((over + under for over, under in pairs), default=0) or 1
    return [(round(over / longest * 100, 2), round(under / longest * 100, 2)) for over, under in pairs]
