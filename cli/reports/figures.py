"""The names and texts of a report's figures, the same in every format."""

from typing import Any

from trueup.drift.causes import cause_title
from trueup.reports.display import percent, show
from trueup.reports.run_report import DriftReport
from trueup.settings.settings import get_settings, host_name


def title_of(report: DriftReport) -> str:
    """Return the title of the report, which ends with the host's name."""
    if report.dry_run:
        what = "dry run: nothing was written"
    elif report.since is not None:
        what = f"since {show(report.since)[:16]} UTC"
    else:
        what = f"run {report.run_id}"
    return f"Drift of {show(host_name(get_settings()))}, {what}"


def explained_of(report: DriftReport) -> str:
    """Return the share of the explained tokens, and how sure that is."""
    drifted = report.tokens_drifted
    if not drifted:
        return percent(None)
    shares = (report.tokens_explained / drifted, report.tokens_proven / drifted, report.tokens_inferred / drifted)
    return "{}: {} proven, {} inferred".format(*map(percent, shares))


def summary_of(report: DriftReport) -> dict[str, Any]:
    """Return the names and values of the report's summary."""
    several = report.since is not None
    run = "dry run, nothing was written" if report.dry_run else f"{report.run_id} ({report.kind})"
    return {
        ("runs" if several else "run"): report.runs if several else run,
        "status": report.status,
        ("since (UTC)" if several else "started (UTC)"): report.started_at,
        "finished (UTC)": report.finished_at,
        **({"only": filter_of(report)} if filter_of(report) else {}),
        "counters checked": report.checked,
        "drifted": report.drifted,
        "new": report.found_new,
        "corrected": report.corrected,
        "in review": report.in_review,
        **({"set aside": report.set_aside} if report.set_aside else {}),
        "tokens overstated": report.tokens_overstated,
        "tokens understated": report.tokens_understated,
        "tokens explained": explained_of(report),
        **({"defects": report.defects} if report.defects else {}),
    }


def filter_of(report: DriftReport) -> str:
    """Return the filter of the report in words; empty without a filter."""
    only = report.filter
    parts = [
        *(f"cause {cause_title(cause)}" for cause in only.causes),
        *([f"{only.min_tokens:,} tokens or more"] if only.min_tokens else []),
        *([f"user {only.user_id}"] if only.user_id is not None else []),
    ]
    return ", ".join(parts)
