"""`trueup drift review`, and what a person decides: accept, grant, ignore, undo."""

from datetime import datetime
from typing import Any

import click

from trueup.accounts.grants import check_text
from trueup.accounts.user_ids import UserId
from trueup.cli import EXIT_ERROR
from trueup.cli.audit import END, by_option, note_option
from trueup.cli.context import USER, json_option, servers
from trueup.cli.drift.bulk_review import check_choice, decide_many, filter_options, many_options
from trueup.cli.output import print_json, print_table, show
from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.drift.causes import cause_title
from trueup.review.decisions import (
    Choice,
    Decision,
    DecisionRefusedError,
    ReviewFilter,
    ReviewItem,
    decide_drift,
    list_reviews,
    undo_run,
)
from trueup.settings.settings import get_settings

NUMBER = click.IntRange(1, 2**63 - 1)


@click.command()
@click.option("--user", type=USER, help="Only this user's.")
@filter_options
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="How many at most.")
@json_option
def review(
    user: UserId | None,
    causes: tuple[str, ...] | None,
    max_tokens: int | None,
    run_id: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """List the drifts that wait for a person, longest first, and what each choice would do.

    \b
    Example:
      trueup drift review
      trueup drift review --user 42 --json
      trueup drift review --cause missed_decrement --max 500
    """
    kind = get_settings().host.user_id_type
    only = ReviewFilter(causes=causes or (), max_tokens=max_tokens, run_id=run_id)
    with servers("postgres"):
        items = retrying(lambda connection: list_reviews(connection, kind, user_id=user, only=only, limit=limit))
    if as_json:
        print_json([vars(item) | {"choices": choices_of(item)} for item in items])
        return
    print_table(
        (
            "drift",
            "user",
            "tokens",
            "cause",
            "certainty",
            "evidence",
            "held because",
            "since (UTC)",
            "counter",
            "accept",
            "grant",
        ),
        [_row(item) for item in items],
        empty="Nothing waits for a person.",
    )
    if items:
        click.echo("\ntrueup drift accept DRIFT --note …    set the counter to what is under accept")
        click.echo(
            "trueup drift grant DRIFT --reason … --reference …    give the tokens under grant; the counter stays"
        )
        click.echo("trueup drift ignore DRIFT --note …    leave this difference alone while it stays the same")


@click.command()
@click.argument("drifts", metavar="DRIFT...", type=NUMBER, nargs=-1)
@many_options
@note_option
@by_option
@json_option
def accept(drifts: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Set the counters right of DRIFTs that wait for a person, if they are as they were found.

    Give their numbers, or choose many: they are counted first, and you are asked.

    \b
    Example:
      trueup drift accept 7 --note "refunded"
      trueup drift accept --cause missed_decrement --max 500 --note "checked a sample"
    """
    _decide_some(drifts, "accept", as_json, **options)


@click.command()
@click.argument("drift", type=NUMBER)
@click.option("--reason", required=True, help="Why, for the audit.")
@click.option("--reference", required=True, help="What was paid, such as a transaction's id; grants once.")
@click.option("--expires", type=END, help="When what is left of it lapses; by default never.")
@by_option
@json_option
def grant(drift: int, reason: str, reference: str, expires: datetime | None, by: str, as_json: bool) -> None:
    """Give what the counter of DRIFT shows too much as a grant: then the counter is right as it is.

    \b
    Example:
      trueup drift grant 7 --reason "pack of 500" --reference tx-1881
    """
    _decide((drift,), "grant", as_json, note=reason, by=by, reference=reference, expires_at=expires)


@click.command()
@click.argument("drifts", metavar="DRIFT...", type=NUMBER, nargs=-1)
@many_options
@note_option
@by_option
@json_option
def ignore(drifts: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Leave the differences of DRIFTs alone while they stay the same, until the user's next window.

    Give their numbers, or choose many: they are counted first, and you are asked.

    \b
    Example:
      trueup drift ignore 7 --note "our own test account"
      trueup drift ignore --run 12 --cause manual_edit --note "support credits"
    """
    _decide_some(drifts, "ignore", as_json, **options)


@click.command()
@click.argument("run", type=NUMBER)
@note_option
@by_option
@json_option
def undo(run: int, note: str, by: str, as_json: bool) -> None:
    """Put the counters that RUN corrected back to what it had seen, where nobody has written since.

    The next run does not correct them again: they wait for a person. May be repeated.

    \b
    Example:
      trueup drift undo 12 --note "the plan's size was wrong"
    """
    with servers("postgres"), connect() as connection:
        undone = undo_run(connection, run, get_settings().host.user_id_type, by=by, note=note)
    if as_json:
        print_json(undone)
        return
    click.echo(f"Put back: {show(undone.counters)}. Left alone: {show(undone.left)}, written since or in use now.")
    if undone.counters:
        click.echo("The next run holds them for review, and does not correct them again: `trueup drift review`.")


def choices_of(item: ReviewItem) -> dict[str, Any]:
    """Return what each choice would do, None where it can't be made."""
    return {
        "accept": None if item.changed else {"counter": item.expected},
        "grant": None if item.changed or item.tokens_to_grant is None else {"tokens": item.tokens_to_grant},
        "ignore": None if item.changed else {"tokens": item.tokens},
    }


def _row(item: ReviewItem) -> tuple[object, ...]:
    choices = choices_of(item)
    counter = "null" if item.counter is None else show(item.counter)
    accepted = "changed: reconcile again" if item.changed else f"{counter} → {show(item.expected)}"
    granted = None if choices["grant"] is None else f"+{show(item.tokens_to_grant)}"
    return (
        item.id,
        str(item.user_id),
        item.tokens,
        cause_title(item.cause),
        item.certainty,
        short_evidence(item.evidence),
        item.reason,
        item.found_at,
        counter,
        accepted,
        granted,
    )


def short_evidence(evidence: dict[str, Any]) -> str:
    """Return a drift's evidence in a line: each cause's tokens, and the first row that proves it."""
    parts = []
    for component in evidence.get("components", []):
        row = _first_row(component)
        parts.append(f"{component['tokens']:+,}" + (f" ({row})" if row else ""))
    others = evidence.get("alternatives")
    return "; ".join(parts) + (f"; or {', '.join(map(cause_title, others))}" if others else "")


def _first_row(value: Any) -> str | None:
    """Return what the first row in a piece of evidence is called."""
    if isinstance(value, dict):
        for name in ("reference", "log_id", "id"):
            if isinstance(value.get(name), str | int):
                return f"{name.removesuffix('_id').replace('id', 'row')} {value[name]}"
        value = list(value.values())
    if isinstance(value, list):
        return next((found for found in map(_first_row, value) if found), None)
    return None


def _decide_some(
    drifts: tuple[int, ...],
    choice: Choice,
    as_json: bool,
    *,
    causes: tuple[str, ...] | None,
    max_tokens: int | None,
    run_id: int | None,
    limit: int | None,
    yes: bool,
    note: str,
    by: str,
) -> None:
    """Decide about those that are named, or about many that are chosen."""
    only = ReviewFilter(causes=causes or (), max_tokens=max_tokens, run_id=run_id)
    check_choice(drifts, only, limit)
    if drifts:
        _decide(drifts, choice, as_json, note=note, by=by)
    else:
        decide_many(
            choice, only, limit, by=check_text("by", by), note=check_text("note", note), yes=yes, as_json=as_json
        )


def _decide(drifts: tuple[int, ...], choice: Choice, as_json: bool, **more: Any) -> None:
    """Decide about each; what is refused is said, and the others are decided all the same."""
    made: list[Decision] = []
    refused = 0
    with servers("postgres"):
        for drift in drifts:
            try:
                decision = _decide_one(drift, choice, **more)
            except DecisionRefusedError as error:
                refused += 1
                click.echo(f"Error: {error}", err=True)
            else:
                made.append(decision)
                if not as_json:
                    click.echo(_told(decision))
    if as_json:
        print_json(made)
    if refused:
        click.get_current_context().exit(EXIT_ERROR)


def _decide_one(drift: int, choice: Choice, **more: Any) -> Decision:
    # Made again by the same drift and choice, it is made once.
    return retrying(lambda connection: decide_drift(connection, drift, choice, **more))


def _told(decision: Decision) -> str:
    if decision.already:
        when = show(decision.decided_at)
        return f"Drift {decision.drift_id}: {decision.by} has decided {decision.choice!r} at {when} already."
    before, after = (
        "null" if value is None else show(value) for value in (decision.counter_before, decision.counter_after)
    )
    match decision.choice:
        case "accept":
            done = f"counter {before} → {after}"
        case "grant":
            done = f"granted {show(decision.tokens_granted)} tokens (grant {decision.grant_id}); counter stays {after}"
        case _:
            done = f"ignored; counter stays {after}"
    return f"Drift {decision.drift_id}, user {decision.user_id}: {done}."
