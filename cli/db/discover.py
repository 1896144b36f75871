"""`trueup db discover`: propose the [host] mapping from what the database's catalog says."""

import os
from pathlib import Path

import click
from sqlalchemy import text

from trueup.cli import EXIT_ERROR
from trueup.cli.context import json_option, servers
from trueup.cli.output import print_json, print_table, show
from trueup.cli.reports.options import write_file
from trueup.database import engine as database
from trueup.discovery import Proposal, propose, read_catalog
from trueup.discovery.toml import host_section, merged, read_host
from trueup.errors import TrueupError
from trueup.settings.settings import CONFIG_VARIABLE, get_settings, read_settings

DEFAULT_FILE = "trueup.toml"


@click.command()
@click.option("--schema", "schemas", multiple=True, help="Only tables of this schema; may be given more than once.")
@click.option("--write", is_flag=True, help="Write the mapping to a file, whose other sections stay as they are.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"The file to write; by default the one that {CONFIG_VARIABLE} names and that exists, else {DEFAULT_FILE}.",
)
@click.option("--force", is_flag=True, help="Replace the [host] that the file has.")
@json_option
@click.pass_context
def discover(
    ctx: click.Context, schemas: tuple[str, ...], write: bool, output: Path | None, force: bool, as_json: bool
) -> None:
    """Look for the host's tables, and propose how to map them.

    Reads the catalog and a few rows in a read-only transaction. What is not found is taken from [host] in trueup.toml,
    if you have set it there. Exit code 1: a table or column that nothing works without is missing; then nothing is
    written.

    \b
    Example:
      trueup db discover
      trueup db discover --schema app --write
    """
    if (output or force) and not write:
        raise click.UsageError("--output and --force belong to --write: add it, or leave them out.")
    with servers("postgres"), database.transaction() as connection:
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        given = get_settings().host.model_dump(exclude_unset=True)
        proposal = propose(connection, read_catalog(connection, schemas), given)
    if as_json:
        print_json(proposal.as_json())
    else:
        _print(proposal)
    if proposal.mapping is None:
        ctx.exit(EXIT_ERROR)
    if write:
        _write(proposal, output or Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_FILE), force=force)


def _print(proposal: Proposal) -> None:
    rows = [(one.setting, one.value, one.certainty, one.why) for one in proposal.choices]
    print_table(("setting", "value", "how sure", "why"), rows, empty="No table was found that could be the host's.")
    for title, lines in (
        ("Not found:", [_gap(gap.setting, gap.why, gap.stops, gap.remedy) for gap in proposal.gaps]),
        ("To know:", proposal.notes),
    ):
        if lines:
            click.echo(f"\n{title}")
        for line in lines:
            click.echo(f"- {show(line)}")
    if proposal.mapping is None:
        click.echo(
            "\nWithout these there is no mapping: set them under [host] in trueup.toml, and run "
            "`trueup db discover --write --force`: it keeps what you set there for what it does not find."
        )
    elif not proposal.settings:
        click.echo("\nAll names are Django's default ones: trueup.toml needs no [host].")
    else:
        click.echo(f"\n{host_section(proposal.settings)}", nl=False)


def _gap(setting: str, why: str, stops: str, remedy: str) -> str:
    needed = f" Needed for {stops}." if stops else ""
    return f"{setting}: {why}.{needed} Remedy: {remedy}."


def _write(proposal: Proposal, path: Path, *, force: bool) -> None:
    """Put the mapping into the file, and read it back as the settings do."""
    remarks = [_gap(gap.setting, gap.why, gap.stops, gap.remedy) for gap in proposal.gaps if gap.stops]
    section = host_section(proposal.settings, [show(remark) for remark in remarks])
    try:
        content = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise TrueupError(f"--output: {path} can't be read: {error}. Give another file.") from error
    text_of_file = merged(content, section, force=force)
    if read_host(text_of_file) != proposal.mapping:
        raise TrueupError(f"--output: {path} would not say what was found. Nothing was written; please report this.")
    write_file(path, [text_of_file])
    _read_back(proposal, path)
    click.echo(f"Written to {path}. Next: `trueup drift report --read-only`.", err=True)


def _read_back(proposal: Proposal, path: Path) -> None:
    """Read the settings with this file, as the next command will."""
    before = os.environ.get(CONFIG_VARIABLE)
    os.environ[CONFIG_VARIABLE] = str(path)
    try:
        found = read_settings().host
    finally:
        del os.environ[CONFIG_VARIABLE]
        if before is not None:
            os.environ[CONFIG_VARIABLE] = before
    if found != proposal.mapping:
        raise TrueupError(
            f"{path} was written, but a variable TRUEUP_HOST or TRUEUP_HOST__… of the environment says otherwise and "
            "comes first. Unset it."
        )
