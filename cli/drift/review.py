"""`trueup drift review`, and the decisions of a person: accept, grant, ignore, undo."""

from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import check_text
from trueup.cli import EXIT_ERROR
from trueup.cli.options import (
    CAUSE,
    NUMBER,
    TOKENS,
    USER,
    Command,
    by_option,
    grant_options,
    json_option,
    limit_option,
    note_option,
    require_user,
    servers,
)
from trueup.cli.output import print_json, print_table, show
from trueup.cli.progress import progress_bar
from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.drift.causes import cause_title
from trueup.review.decisions import (
    MAX_CHOSEN,
    BulkDecision,
    Choice,
    ChosenDrifts,
    Decision,
    DecisionRefusedError,
    ReviewFilter,
    ReviewItem,
    choose_drifts,
    decide_chosen,
    decide_drift,
    list_reviews,
    undo_run,
)
from trueup.settings.settings import get_settings

_LEFT_REASONS = {
    "may_be_paid": "it shows tokens that the user may have paid for; decide about each one by its number",
    "changed": "the difference has changed; the next run finds it again",
    "busy": "the application is writing the counter now; try again",
    "gone": "the subscription no longer exists",
    "superseded": "a newer drift of the user exists",
    "decided_otherwise": "another person decided in the meantime",
    "out_of_range": "the counter's column can't hold the right value",
    "refused": "the database refuses the counter because of a constraint or trigger of the host",
}


def filter_options(command: Command) -> Command:
    """Add `--cause`, `--max` and `--run`, which select drifts in review."""
    for option in (
        click.option("--run", "run_id", type=NUMBER, help="Drifts that this run found first."),
        click.option("--max", "max_tokens", type=TOKENS, help="Drifts of at most this many tokens."),
        click.option("--cause", "causes", type=CAUSE, help='Drifts with exactly this cause, or causes joined by "+".'),
    ):
        command = option(command)
    return command


component_option = click.option(
    "--component", type=click.IntRange(1, 1_000), help="Only this component of the drift; the others stay in review."
)


def decision_options(command: Command) -> Command:
    """Add the drifts, or the options that select many, and the options of a decision."""
    for option in (
        json_option,
        by_option,
        note_option,
        click.option("--yes", is_flag=True, help="Do not ask before a decision about many drifts."),
        click.option("--limit", type=click.IntRange(1, MAX_CHOSEN), help="The maximum, oldest first.  [default: all]"),
        component_option,
        filter_options,
        click.argument("drifts", metavar="DRIFT...", type=NUMBER, nargs=-1),
    ):
        command = option(command)
    return command


@click.command()
@click.option("--user", type=USER, help="Only this user.")
@filter_options
@limit_option(100, 10_000)
@json_option
def review(
    user: UserId | None,
    causes: tuple[str, ...] | None,
    max_tokens: int | None,
    run_id: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """List the drifts in review, oldest first, with the effect of each choice.

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
        if not items:
            retrying(lambda connection: require_user(connection, user))
    if as_json:
        print_json({"drifts": [vars(item) | {"choices": choices_of(item)} for item in items]})
        return
    print_table(
        (
            *("drift", "user", "tokens", "cause", "certainty", "evidence", "held because", "since (UTC)"),
            *("counter", "accept", "grant"),
        ),
        [_row(item) for item in items],
        empty="No drift awaits review.",
    )
    if items:
        click.echo("\ntrueup drift accept DRIFT --note …    set the counter to the value under accept")
        click.echo("trueup drift grant DRIFT --reason … --reference …    grant the tokens under grant")
        click.echo("trueup drift accept DRIFT --component N --note …    decide about one component; the others stay")
        click.echo("trueup drift ignore DRIFT --note …    leave this difference as it is while it does not change")


@click.command()
@decision_options
def accept(**options: Any) -> None:
    """Correct the counters of DRIFTs in review, if they have not changed since they were found.

    Give the numbers of drifts, or select many: the command then shows their count and asks.

    \b
    Example:
      trueup drift accept 7 --note "refunded"
      trueup drift accept 7 --component 2 --note "missed decrements"
      trueup drift accept --cause missed_decrement --max 500 --note "checked a sample"
    """
    _decide_named_or_selected("accept", **options)


@click.command()
@click.argument("drift", type=NUMBER)
@component_option
@grant_options
@by_option
@json_option
def grant(
    drift: int, component: int | None, reason: str, reference: str, expires: datetime | None, by: str, as_json: bool
) -> None:
    """Grant the tokens by which the counter of DRIFT is too high. The counter is then right as it is.

    \b
    Example:
      trueup drift grant 7 --reason "pack of 500" --reference tx-1881
      trueup drift grant 7 --component 1 --reason "pack of 500" --reference tx-1881
    """
    more = {"note": reason, "by": by, "reference": reference, "expires_at": expires}
    _decide((drift,), "grant", as_json, component=component, **more)


@click.command()
@decision_options
def ignore(**options: Any) -> None:
    """Leave the differences of DRIFTs as they are while they do not change, until the user's next period.

    Give the numbers of drifts, or select many: the command then shows their count and asks.

    \b
    Example:
      trueup drift ignore 7 --note "our own test account"
      trueup drift ignore --run 12 --cause manual_edit --note "support credits"
    """
    _decide_named_or_selected("ignore", **options)


@click.command()
@click.argument("run", type=NUMBER)
@note_option
@by_option
@json_option
def undo(run: int, note: str, by: str, as_json: bool) -> None:
    """Restore the counters that RUN corrected, unless they were written since.

    The next run does not correct them again: they wait for a person. The command may be repeated.

    \b
    Example:
      trueup drift undo 12 --note "the plan's size was wrong"
    """
    with servers("postgres"), connect() as connection:
        undone = undo_run(connection, run, get_settings().host.user_id_type, by=by, note=note)
    if as_json:
        print_json(asdict(undone))
        return
    click.echo(f"Restored: {show(undone.counters)}. Unchanged: {show(undone.left)}, written since or in use now.")
    if undone.counters:
        click.echo("The next run holds them for review and does not correct them again: `trueup drift review`.")


def choices_of(item: ReviewItem) -> dict[str, Any]:
    """Return the effect of each choice; None where the choice is not possible."""
    return {
        "accept": None if item.changed else {"counter": item.expected},
        "grant": None if item.changed or item.tokens_to_grant is None else {"tokens": item.tokens_to_grant},
        "ignore": None if item.changed else {"tokens": item.tokens},
    }


def _row(item: ReviewItem) -> tuple[object, ...]:
    counter = "null" if item.counter is None else show(item.counter)
    accepted = "changed: reconcile again" if item.changed else f"{counter} → {show(item.expected)}"
    granted = None if choices_of(item)["grant"] is None else f"+{show(item.tokens_to_grant)}"
    return (
        *(item.id, str(item.user_id), item.tokens, cause_title(item.cause), item.certainty),
        *(short_evidence(item.evidence), item.reason, item.found_at, counter, accepted, granted),
    )


def short_evidence(evidence: dict[str, Any]) -> str:
    """Return a drift's evidence in one line: each component with its tokens and the first row that proves it."""
    components = evidence.get("components", [])
    parts = []
    for number, component in enumerate(components, 1):
        row = _first_row(component)
        name = f"{number}: {cause_title(component['cause'])} " if len(components) > 1 else ""
        ignored = ", ignored" if component.get("ignored") else ""
        parts.append(f"{name}{component['tokens']:+,}{ignored}" + (f" ({row})" if row else ""))
    others = evidence.get("alternatives")
    return "; ".join(parts) + (f"; or {', '.join(map(cause_title, others))}" if others else "")


def _first_row(value: Any) -> str | None:
    """Return the name of the first row in a piece of evidence."""
    if isinstance(value, dict):
        for name in ("reference", "log_id", "id"):
            if isinstance(value.get(name), str | int):
                return f"{name.removesuffix('_id').replace('id', 'row')} {value[name]}"
        value = list(value.values())
    if isinstance(value, list):
        return next((found for found in map(_first_row, value) if found), None)
    return None


def _decide_named_or_selected(
    choice: Choice,
    *,
    drifts: tuple[int, ...],
    causes: tuple[str, ...] | None,
    max_tokens: int | None,
    run_id: int | None,
    limit: int | None,
    component: int | None,
    yes: bool,
    note: str,
    by: str,
    as_json: bool,
) -> None:
    only = ReviewFilter(causes=causes or (), max_tokens=max_tokens, run_id=run_id)
    selected = only != ReviewFilter()
    if drifts and (selected or limit):
        raise click.UsageError("DRIFT and --cause, --max, --run or --limit exclude each other.")
    if component is not None and len(drifts) != 1:
        raise click.UsageError("--component is about one drift: give its number.")
    if drifts:
        _decide(drifts, choice, as_json, note=note, by=by, component=component)
    elif selected:
        by, note = check_text("by", by), check_text("note", note)
        _decide_selected(choice, only, limit or MAX_CHOSEN, by=by, note=note, yes=yes, as_json=as_json)
    else:
        raise click.UsageError("Missing argument 'DRIFT...': give numbers, or select by --cause, --max or --run.")


def _decide(drifts: tuple[int, ...], choice: Choice, as_json: bool, **more: Any) -> None:
    """Decide about each drift. A refusal is printed, and the others are still decided. Exit code 1 after a refusal."""
    decisions: list[Decision] = []
    with servers("postgres"):
        for drift in drifts:
            try:
                decision = _decide_one(drift, choice, **more)
            except DecisionRefusedError as error:
                click.echo(f"Error: {error}", err=True)
            else:
                decisions.append(decision)
                if not as_json:
                    click.echo(_summary(decision))
    if as_json:
        print_json({"decisions": decisions})
    if len(decisions) < len(drifts):
        click.get_current_context().exit(EXIT_ERROR)


def _decide_one(drift: int, choice: Choice, **more: Any) -> Decision:
    # A decision is idempotent by drift and choice, so that a retry is safe.
    return retrying(lambda connection: decide_drift(connection, drift, choice, **more))


def _summary(decision: Decision) -> str:
    if decision.already:
        when = show(decision.decided_at)
        return f"Drift {decision.drift_id}: {decision.by} already decided {decision.choice!r} at {when}."
    counters = (decision.counter_before, decision.counter_after)
    before, after = ("null" if value is None else show(value) for value in counters)
    match decision.choice:
        case "accept":
            done = f"counter {before} → {after}"
        case "grant":
            done = f"granted {show(decision.tokens_granted)} tokens (grant {decision.grant_id}); counter stays {after}"
        case _:
            done = f"ignored; counter stays {after}"
    return f"Drift {decision.drift_id}, user {decision.user_id}: {done}."


def _decide_selected(
    choice: Choice, only: ReviewFilter, limit: int, *, by: str, note: str, yes: bool, as_json: bool
) -> None:
    """Count the selected drifts, ask, and make the same decision about each. Exit code 1 if some stay undecided."""
    kind = get_settings().host.user_id_type
    with servers("postgres"):
        chosen = retrying(lambda connection: choose_drifts(connection, kind, only, limit=limit))
        if chosen.drifts and not yes:
            click.confirm(_question(choice, chosen), abort=True, err=True)
        with progress_bar("deciding", "drifts") as show_progress, connect() as connection:
            made = decide_chosen(
                *(connection, kind, chosen, choice),
                by=by,
                note=note,
                progress=lambda done: show_progress(done, chosen.drifts),
            )
    if as_json:
        print_json({"chosen": chosen.drifts, "decided": made.decided, "left": made.left})
    else:
        _print_outcome(choice, chosen, made)
    if made.left:
        click.get_current_context().exit(EXIT_ERROR)


def _question(choice: Choice, chosen: ChosenDrifts) -> str:
    over, under = show(chosen.tokens_overstated), show(chosen.tokens_understated)
    effect = {
        "accept": f"takes {over} tokens off counters that are too high, and adds {under} to counters that are too low",
        "ignore": f"leaves counters as they are, {over} tokens too high and {under} too low",
    }[choice]
    causes = " and ".join(map(cause_title, chosen.only.causes)) or "any cause"
    return f"{choice.capitalize()} {show(chosen.drifts)} drifts of {causes}? It {effect}."


def _print_outcome(choice: Choice, chosen: ChosenDrifts, made: BulkDecision) -> None:
    if not chosen.drifts:
        click.echo("No drift awaiting review matches these filters.")
        return
    done = {"accept": "Accepted", "ignore": "Ignored"}[choice]
    click.echo(f"{done}: {show(made.decided)} of {show(chosen.drifts)}.")
    for reason, count in made.left.most_common():
        click.echo(f"Undecided: {show(count)}, {_LEFT_REASONS.get(reason, reason)}.")
