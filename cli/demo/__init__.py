"""`trueup demo`: the whole way through the house, on an embedded stack of its own."""

import sys

import click

from trueup.cli import EXIT_ERROR
from trueup.extras import require_extra
from trueup.settings.settings import get_settings


@click.command()
def demo() -> None:
    """Show everything on an embedded stack, in under a minute: gate, record, drift, reconcile, report.

    Real servers and real workers, in a folder of its own (TRUEUP_HOME/demo): a database or broker of yours is never
    touched. Exit code 0 only if all of it happened. It needs the extras [embedded] and [features].

    \b
    Example:
      trueup demo
    """
    require_extra("embedded", "`trueup demo`", "psutil")
    require_extra("features", "`trueup demo`")
    from trueup.cli.demo.stack import demo_stack
    from trueup.cli.demo.story import tell

    with demo_stack(get_settings()) as stack:
        missed = tell(stack)
    if missed:
        click.echo("\nNot everything went as it should:", err=True)
        for expectation in missed:
            click.echo(f"  - {expectation}", err=True)
        click.echo(f"The stack's log: {stack.log}", err=True)
        sys.exit(EXIT_ERROR)
