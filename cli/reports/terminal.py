"""Reports in a terminal: the summary of a drift report, the history of runs, and the explanation of one counter."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from trueup.cli.output import print_facts, print_table, show
from trueup.cli.reports.figures import summary_of
from trueup.drift.causes import ACTION_SENTENCES, CERTAINTY_SENTENCES, cause_sentence, cause_title
from trueup.reconcile.runs import Finding
from trueup.reports.display import count_of, percent, signed
from trueup.reports.history import RunFigures
from trueup.reports.run_report import DriftReport
from trueup.reports.systemic import REMEDIES, sentence_of
from trueup.reports.uncredited import REMEDY, UncreditedPacks
from trueup.reports.user_report import CounterStory
from trueup.settings.policies import PAID_CAUSES

ROWS_OF_PACKS = 20
BARS = "▁▂▃▄▅▆▇█"
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$")
# These facts have sentences of their own. The rest of a component's evidence is printed by name.
_FIGURES = ("original", "consumed", "since", "journal", "after_correction", "held_components")
_IN_SENTENCES = ("cause", "tokens", "certainty")


def print_summary(report: DriftReport, max_rows: int | None = None) -> None:
    """Print a report's figures, its causes, and its largest drifts. `max_rows` None: all rows of the report."""
    print_facts(summary_of(report))
    if report.systemic:
        click.secho("\nSystemic causes", bold=True)
        for cause in report.systemic:
            click.echo(f"{show(sentence_of(cause))}, since {show(cause.since)} UTC.\n  {REMEDIES[cause.kind]}")
    if report.uncredited and report.uncredited.packs:
        _print_uncredited(report.uncredited, ROWS_OF_PACKS if max_rows is None else max_rows)
    shown = report.rows if max_rows is None else report.rows[:max_rows]
    if report.causes:
        click.echo()
        print_table(
            ("cause", "drifts", "proven", "inferred", "tokens overstated", "tokens understated"),
            [
                (cause_title(c.cause), c.drifts, c.proven, c.inferred, c.tokens_overstated, c.tokens_understated)
                for c in report.causes
            ],
        )
    if shown:
        click.echo()
        print_table(
            ("user", "observed", "expected", "drift", "cause", "certainty", "action", "written"),
            [
                (
                    *(str(row.user_id), row.observed, row.expected, row.drift, cause_title(row.cause)),
                    *(row.certainty, row.action.replace("_", " "), row.written),
                )
                for row in shown
            ],
        )
    left = report.drifted - len(shown)
    if left and shown:
        click.echo(f"and {left:,} smaller drifts: `trueup {_command_for_all(report)}`")


def _print_uncredited(found: UncreditedPacks, max_rows: int) -> None:
    click.secho("\nPaid, but in neither plan, grant nor counter", bold=True)
    click.echo(f"{count_of(found.packs, 'pack')}, {found.tokens:,} tokens. {REMEDY}")
    shown = found.newest[:max_rows]
    rows = [(str(pack.user_id), pack.reference, pack.tokens, pack.paid_at, pack.certainty) for pack in shown]
    print_table(("user", "reference", "tokens", "paid (UTC)", "certainty"), rows)
    if found.packs > len(shown):
        click.echo(f"and {found.packs - len(shown):,} older ones")


def _command_for_all(report: DriftReport) -> str:
    if report.kind == "look":
        return "drift report --read-only --rows all"
    if report.dry_run:
        return "reconcile --dry-run --json"
    return "drift report --rows all" if report.run_id is None else f"drift report --run {report.run_id} --rows all"


def sparkline(values: Sequence[int]) -> str:
    """Return one bar for each value, scaled to the largest. Only zero has the lowest bar."""
    top = max(values, default=0)
    if top <= 0:
        return BARS[0] * len(values)
    return "".join(BARS[0] if value <= 0 else BARS[max(1, round(value / top * (len(BARS) - 1)))] for value in values)


def print_history(runs: Sequence[RunFigures]) -> None:
    """Print the runs, oldest first, below a line of the drifted tokens of finished runs over all users."""
    if not runs:
        click.echo("There was no reconcile run in that time. Start one with `trueup reconcile`.")
        return
    line = [run.tokens_drifted for run in runs if run.only_user is None and run.status == "finished"]
    if line:
        click.echo(f"drifted tokens  {sparkline(line)}  {line[0]:,} → {line[-1]:,}, at most {max(line):,}\n")
    print_table(
        (
            *("run", "kind", "started (UTC)", "took", "status", "checked", "drifted", "new", "corrected", "in review"),
            *("overstated", "understated", "explained", "defects"),
        ),
        [
            (
                str(run.id),
                run.kind if run.only_user is None else f"user {run.only_user}",
                run.started_at,
                "–" if run.seconds is None else f"{run.seconds:.1f} s",
                run.status,
                *(run.checked, run.drifted, run.found_new, run.corrected, run.in_review),
                *(run.tokens_overstated, run.tokens_understated, percent(run.share_explained), run.defects),
            )
            for run in runs
        ],
    )
    for run in runs:
        if run.error:
            click.echo(f"run {run.id} failed: {show(run.error)}")


def print_story(story: CounterStory) -> None:
    """Print the account of a user, the sum behind the counter, its drift with causes, and its past."""
    account = story.account
    if account.subscribed:
        state = "active" if account.is_active else "deactivated"
        end = f"until {show(account.end_date)}" if account.end_date else "without an end"
        start = show(account.window_start)
        click.echo(f"User {show(str(account.user_id))}: {state}, period since {start} (UTC), {end}.\n")
        _print_sum(story)
        if story.finding:
            _print_finding(story.finding, story.plans)
        else:
            click.echo("\nThe counter is right: there is no drift.")
        since = "unknown" if story.base.at is None else f"{show(story.base.at)} UTC"
        click.echo(f"\nThe counter was last known to be right: {since} ({show(story.base.why)}).")
        _print_told(story)
    else:
        click.echo(f"User {show(str(account.user_id))} has no subscription any more. Earlier findings and decisions:")
    _print_past(story)


def _print_told(story: CounterStory) -> None:
    """Print each change of the counter since it was last known."""
    if story.told:
        click.echo("\nThe changes of the counter, oldest first (UTC):")
    for told in story.told:
        click.echo(f"  {_words(told.at)}  {show(told.sentence)}")


def _print_sum(story: CounterStory) -> None:
    """Print the sum behind the counter line by line, so that a person can check it."""
    lines: dict[str, Any] = {
        "original (plan and grants)": story.original,
        "− consumed (usage log)": story.consumed,
        "= left": story.original - story.consumed,
    }
    if story.expected != story.original - story.consumed:  # a counter of used tokens shows an overdraft
        lines["expected (never below zero)"] = story.expected
    if story.finding:
        for part in story.finding.explanation.components:
            name = f"{'+' if part.tokens >= 0 else '−'} {cause_title(part.cause)}"
            lines[name] = lines.get(name, 0) + abs(part.tokens)
        named = sum(part.tokens for part in story.finding.explanation.components)
        rest = (story.observed or 0) - (story.original - story.consumed) - named
        if rest and story.observed is not None:
            lines[f"{'+' if rest > 0 else '−'} without a cause"] = abs(rest)
    counts_up = story.finding is not None and story.finding.drift.counts_up
    lines["counter (original − used tokens)" if counts_up else "counter"] = story.observed
    lines["drift (counter − expected)"] = story.drift
    width = max(len(show(value)) for value in lines.values())
    print_facts({name: show(value).rjust(width) for name, value in lines.items()})


def _print_finding(found: Finding, plans: dict[int, list[str]]) -> None:
    drift, explanation = found.drift, found.explanation
    if drift.observed is None:
        effect = "The counter is NULL: the application may show nothing, or refuse the user."
    elif drift.tokens > 0:
        has_paid_cause = any(part.tokens > 0 and part.cause in PAID_CAUSES for part in explanation.components)
        may_be_paid = has_paid_cause or drift.tokens in plans
        what = "more than plan, grants and usage leave; they may be paid" if may_be_paid else "that are used up"
        effect = f"The counter shows {drift.tokens:,} tokens {what}.{_size_of_plan(drift.tokens, plans)}"
    else:
        effect = f"The user has {-drift.tokens:,} tokens that the counter does not show."
    click.echo(f"\n{effect}")
    if not explanation.components and drift.surplus != explanation.in_flight:
        click.echo(f"Why: unexplained. {cause_sentence('unexplained').capitalize()}.")
    for part in explanation.components:
        click.echo(f"\nWhy: {cause_title(part.cause)}, {signed(part.tokens)} tokens: {cause_sentence(part.cause)}.")
        size = _size_of_plan(part.tokens, plans) if part.tokens != drift.tokens else ""
        click.echo(f"  {part.certainty}: {CERTAINTY_SENTENCES[part.certainty]}.{size}")
        _print_evidence(part.evidence)
    if explanation.alternatives:
        others = ", ".join(cause_title(cause) for cause in explanation.alternatives)
        click.echo(f"\nOther possible causes: {others}.")
    if explanation.in_flight:
        click.echo(f"\n{explanation.in_flight:,} tokens were logged so recently that the host may still subtract them.")
    _print_evidence({k: v for k, v in explanation.evidence.items() if k not in _FIGURES})
    why = cause_title(show(found.verdict.reason))
    if found.verdict.write is not None:
        click.echo(f"\nA run now would set the counter to {found.verdict.write:,} ({why}).")
    else:
        click.echo(f"\nA run now: {ACTION_SENTENCES.get(found.action, found.action)} ({why}).")


def _size_of_plan(tokens: int, plans: dict[int, list[str]]) -> str:
    """Return the sentence about the plans of this size, which may have been paid for; empty if there is none."""
    names = " and ".join(repr(name) for name in plans.get(tokens, []))
    return show(f" This is the size of the plan {names}.") if names else ""


def _print_evidence(evidence: dict[str, Any]) -> None:
    """Print evidence: rows one a line, other facts as name and value."""
    for name, value in evidence.items():
        if name in _IN_SENTENCES or value in (None, [], {}):
            continue
        label = name.replace("_", " ")
        if isinstance(value, list):
            click.echo(f"  {label}:")
            for item in value:
                click.echo(f"    {_words(item)}")
        else:
            click.echo(f"  {label}: {_words(value)}")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return show(json.dumps(value, ensure_ascii=False))
    if isinstance(value, str) and _TIME.match(value):
        return show(datetime.fromisoformat(value).astimezone(UTC))
    return show(value)


def _print_past(story: CounterStory) -> None:
    if story.past:
        click.echo("\nEarlier findings, newest first:")
        rows = [
            (
                *(row.found_at, str(row.run_id), row.observed, row.expected, row.drift, cause_title(row.cause)),
                *(ACTION_SENTENCES.get(row.action, row.action), row.written),
            )
            for row in story.past
        ]
        heading = ("found (UTC)", "run", "counter", "expected", "drift", "cause", "what was done", "written")
        print_table(heading, rows)
    if story.decisions:
        click.echo("\nDecisions, newest first:")
        rows_decided = [
            (d.decided_at, d.decision, d.decided_by, d.counter_before, d.counter_after, d.note) for d in story.decisions
        ]
        print_table(("when (UTC)", "decision", "by", "counter before", "after", "note"), rows_decided)
