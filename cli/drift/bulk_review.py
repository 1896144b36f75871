"""Deciding about many drifts at once: what chooses them, the question before, and what became of them."""

from collections.abc import Callable
from typing import Any

import click

from trueup.cli import EXIT_ERROR
from trueup.cli.context import TOKENS, servers
from trueup.cli.output import print_json, show
from trueup.cli.progress import progress_bar
from trueup.cli.reports.options import CAUSE
from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.drift.causes import cause_title
from trueup.review.decisions import (
    MAX_CHOSEN,
    BulkDecision,
    Choice,
    ChosenDrifts,
    ReviewFilter,
    choose_drifts,
    decide_chosen,
)
from trueup.settings.settings import get_settings

Command = Callable[..., Any]

_WHY_LEFT = {
    "changed": "the difference is another one by now: the next run finds it anew",
    "busy": "the application is writing the counter now: try again",
    "gone": "the subscription is there no more",
    "superseded": "a newer drift of the user has come after it",
    "decided_otherwise": "somebody else has decided meanwhile",
    "out_of_range": "the counter's column can't hold what is left",
    "refused": "the database does not take the counter: a constraint or trigger of the host's",
}


def filter_options(command: Command) -> Command:
    """Add `--cause`, `--max` and `--run`: which of the drifts that wait for a person."""
    for option in (
        click.option("--run", "run_id", type=click.IntRange(1, 2**63 - 1), help="Those that this run found first."),
        click.option("--max", "max_tokens", type=TOKENS, help="Those off by at most so many tokens."),
        click.option("--cause", "causes", type=CAUSE, help='Those of exactly this cause; several joined by "+".'),
    ):
        command = option(command)
    return command


def many_options(command: Command) -> Command:
    """Add what chooses many drifts instead of naming them, how many at most, and that no question is asked."""
    command = click.option("--yes", is_flag=True, help="Do not ask before deciding about many.")(command)
    limit = click.option(
        "--limit", type=click.IntRange(1, MAX_CHOSEN), help="At most so many, those found first.  [default: all]"
    )
    return filter_options(limit(command))


def check_choice(drifts: tuple[int, ...], only: ReviewFilter, limit: int | None) -> None:
    """Raise a usage error unless drifts are either named or chosen."""
    chosen = only != ReviewFilter()
    if drifts and (chosen or limit):
        raise click.UsageError("DRIFT and --cause, --max, --run or --limit exclude each other.")
    if not drifts and not chosen:
        raise click.UsageError("Missing argument 'DRIFT...': give their numbers, or choose by --cause, --max or --run.")


def decide_many(
    choice: Choice, only: ReviewFilter, limit: int | None, *, by: str, note: str, yes: bool, as_json: bool
) -> None:
    """Count the drifts, ask, and decide the same about all of them. Exit code 1 if some were left."""
    kind = get_settings().host.user_id_type
    with servers("postgres"):
        chosen = retrying(lambda connection: choose_drifts(connection, kind, only, limit=limit or MAX_CHOSEN))
        if chosen.drifts and not yes:
            click.confirm(_question(choice, chosen), abort=True, err=True)
        with progress_bar("deciding", "drifts") as bar, connect() as connection:
            made = decide_chosen(
                connection,
                kind,
                chosen,
                choice,
                by=by,
                note=note,
                progress=lambda done: bar.update(done, chosen.drifts),
            )
    if as_json:
        print_json({"chosen": chosen.drifts, "decided": made.decided, "left": made.left})
    else:
        _tell(choice, chosen, made)
    if made.left:
        click.get_current_context().exit(EXIT_ERROR)


def _question(choice: Choice, chosen: ChosenDrifts) -> str:
    over, under = show(chosen.tokens_overstated), show(chosen.tokens_understated)
    effect = {
        "accept": f"takes {over} tokens off counters that are too high, and gives {under} to those too low",
        "ignore": f"leaves counters alone that are {over} tokens too high and {under} too low",
    }[choice]
    causes = " and ".join(map(cause_title, chosen.only.causes)) or "any cause"
    return f"{choice.capitalize()} {show(chosen.drifts)} drifts of {causes}? It {effect}."


def _tell(choice: Choice, chosen: ChosenDrifts, made: BulkDecision) -> None:
    if not chosen.drifts:
        click.echo("None of the drifts that wait for a person is such a one.")
        return
    done = {"accept": "Accepted", "ignore": "Ignored"}[choice]
    click.echo(f"{done}: {show(made.decided)} of {show(chosen.drifts)}.")
    for reason, count in made.left.most_common():
        click.echo(f"Left: {show(count)}, {_WHY_LEFT.get(reason, reason)}.")
