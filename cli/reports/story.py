"""One user's counter in words: what an operator reads before deciding about it."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import click

from trueup.cli.output import print_facts, print_table, show
from trueup.cli.reports.figures import signed
from trueup.drift.causes import ACTION_SENTENCES, CERTAINTY_SENTENCES, cause_sentence, cause_title
from trueup.reconcile.runs import Finding
from trueup.reports.user_report import CounterStory

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$")
# These are told in words of their own; the rest of a component's evidence is printed as it is.
_TOLD = ("cause", "tokens", "certainty")


def print_story(story: CounterStory) -> None:
    """Print all about a user's counter."""
    account = story.account
    if account.subscribed:
        state = "active" if account.is_active else "deactivated"
        end = f"until {show(account.end_date)}" if account.end_date else "without an end"
        click.echo(
            f"User {show(str(account.user_id))}: {state}, window since {show(account.window_start)} (UTC), {end}.\n"
        )
        _print_sum(story)
        if story.finding:
            _print_finding(story.finding)
        else:
            click.echo("\nThe counter is right: there is no drift.")
        since = "ever" if story.base.at is None else f"{show(story.base.at)} UTC"
        click.echo(f"\nKnown to have been right at: {since} ({show(story.base.why)}).")
    else:
        click.echo(f"User {show(str(account.user_id))} has no subscription any more. What was found before:")
    _print_past(story)


def _print_sum(story: CounterStory) -> None:
    """The sum that makes the counter, line by line, so that it can be checked."""
    lines: dict[str, Any] = {
        "original (plan and grants)": story.original,
        "− consumed (usage log)": story.consumed,
        "= left": story.original - story.consumed,
    }
    if story.original < story.consumed:
        lines["expected (never below zero)"] = story.expected
    if story.finding:
        for part in story.finding.explanation.components:
            name = f"{'+' if part.tokens >= 0 else '−'} {cause_title(part.cause)}"
            lines[name] = lines.get(name, 0) + abs(part.tokens)
        named = sum(part.tokens for part in story.finding.explanation.components)
        rest = (story.observed or 0) - (story.original - story.consumed) - named
        if rest and story.observed is not None:
            lines[f"{'+' if rest > 0 else '−'} without a cause"] = abs(rest)
    lines["counter"] = story.observed
    lines["drift (counter − expected)"] = story.drift
    width = max(len(show(value)) for value in lines.values())
    print_facts({name: show(value).rjust(width) for name, value in lines.items()})


def _print_finding(found: Finding) -> None:
    drift, explanation = found.drift, found.explanation
    if drift.observed is None:
        effect = "The counter is empty: the user may be shown nothing, or refused."
    elif drift.tokens > 0:
        effect = f"The user is shown {drift.tokens:,} tokens that are gone."
    else:
        effect = f"The user has {-drift.tokens:,} tokens that the counter does not show."
    click.echo(f"\n{effect}")
    if not explanation.components:
        click.echo(f"Why: unexplained. {cause_sentence('unexplained').capitalize()}.")
    for part in explanation.components:
        click.echo(f"\nWhy: {cause_title(part.cause)}, {signed(part.tokens)} tokens: {cause_sentence(part.cause)}.")
        click.echo(f"  {part.certainty}: {CERTAINTY_SENTENCES[part.certainty]}.")
        _print_evidence(part.evidence)
    if explanation.alternatives:
        others = ", ".join(cause_title(cause) for cause in explanation.alternatives)
        click.echo(f"\nWould fit as well: {others}.")
    if explanation.in_flight:
        click.echo(f"\n{explanation.in_flight:,} tokens were logged so lately that their decrement may still come.")
    _print_evidence({k: v for k, v in explanation.evidence.items() if k not in ("original", "consumed", "since")})
    why = cause_title(show(found.verdict.reason))
    if found.verdict.write is not None:
        click.echo(f"\nA run now would set the counter to {found.verdict.write:,} ({why}).")
    else:
        click.echo(f"\nA run now: {ACTION_SENTENCES.get(found.action, found.action)} ({why}).")


def _print_evidence(evidence: dict[str, Any]) -> None:
    """Print evidence: rows one a line, other facts as name and value."""
    for name, value in evidence.items():
        if name in _TOLD or value in (None, [], {}):
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
