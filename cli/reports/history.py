"""The history of runs in a terminal."""

from collections.abc import Sequence

import click

from trueup.cli.output import print_table, show
from trueup.cli.reports.figures import percent
from trueup.cli.reports.sparkline import sparkline
from trueup.reports.history import RunFigures


def print_history(runs: Sequence[RunFigures]) -> None:
    """Print the runs, oldest first, below a line of their drifted tokens, in which runs over one user are left out."""
    if not runs:
        click.echo("There has been no reconcile run in that time. Start one with `trueup reconcile`.")
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
