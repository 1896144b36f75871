"""`trueup demo`: show all of trueup on an embedded stack of its own."""

import sys

import click

from trueup.cli import EXIT_ERROR
from trueup.extras import require_extra
from trueup.settings.settings import get_settings


@click.command()
def demo() -> None:
    """Show all of trueup on an embedded stack, in under a minute: gate, record, drift, reconcile, report.

    The demo runs real servers and workers in the folder TRUEUP_HOME/demo, and never touches your database or broker.
    Exit code 0: every step had the expected result. It needs the extras [embedded] and [features].

    \b
    Example:
      trueup demo
    """
    require_extra("embedded", "`trueup demo`", "psutil")
    require_extra("features", "`trueup demo`")
    from trueup.cli.demo.stack import demo_stack
    from trueup.cli.demo.story import run_story

    with demo_stack(get_settings()) as stack:
        failed = run_story(stack)
    if failed:
        click.echo("\nThese expected results are missing:", err=True)
        for expectation in failed:
            click.echo(f"  - {expectation}", err=True)
        click.echo(f"The stack's log: {stack.log}", err=True)
        sys.exit(EXIT_ERROR)
