"""`trueup db discover`: propose the [host] mapping from the database's catalog."""

import os
from pathlib import Path

import click
from sqlalchemy import text

from trueup.cli import EXIT_ERROR
from trueup.cli.options import json_option, servers
from trueup.cli.output import print_json, print_table, show, write_file
from trueup.database import engine as database
from trueup.discovery import Proposal, propose, read_catalog
from trueup.discovery.toml import host_section, merged, read_host
from trueup.errors import TrueupError
from trueup.settings.settings import CONFIG_VARIABLE, get_settings, read_settings

DEFAULT_FILE = "trueup.toml"


@click.command()
@click.option("--schema", "schemas", multiple=True, help="Only tables of this schema. May be repeated.")
@click.option("--write", is_flag=True, help="Write the mapping to a file, and keep its other sections.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"The file to write.  [default: the file that {CONFIG_VARIABLE} names, else {DEFAULT_FILE}]",
)
@click.option("--force", is_flag=True, help="Replace the file's [host] section.")
@json_option
@click.pass_context
def discover(
    ctx: click.Context, schemas: tuple[str, ...], write: bool, output: Path | None, force: bool, as_json: bool
) -> None:
    """Find the host's tables and propose a mapping.

    It reads the catalog and a few rows in a read-only transaction. Names that it does not find come from [host] in
    trueup.toml, if you have set them. Exit code 1: a required table or column is missing, and nothing was written.

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
    print_table(("setting", "value", "certainty", "reason"), rows, empty="No table resembles one of the host's.")
    for title, lines in (
        ("Not found:", [_gap(gap.setting, gap.why, gap.stops, gap.remedy) for gap in proposal.gaps]),
        ("Notes:", proposal.notes),
    ):
        if lines:
            click.echo(f"\n{title}")
        for line in lines:
            click.echo(f"- {show(line)}")
    if proposal.mapping is None:
        click.echo(
            "\nThere is no mapping without these. Set them under [host] in trueup.toml, and run "
            "`trueup db discover --write --force`, which keeps your settings for names that it does not find."
        )
    elif not proposal.settings:
        click.echo("\nAll names are Django's defaults: trueup.toml needs no [host] section.")
    else:
        click.echo(f"\n{host_section(proposal.settings)}", nl=False)


def _gap(setting: str, why: str, stops: str, remedy: str) -> str:
    needed = f" Needed for {stops}." if stops else ""
    return f"{setting}: {why}.{needed} Remedy: {remedy}."


def _write(proposal: Proposal, path: Path, *, force: bool) -> None:
    """Write the mapping to the file, and check it by reading the settings again."""
    remarks = [_gap(gap.setting, gap.why, gap.stops, gap.remedy) for gap in proposal.gaps if gap.stops]
    section = host_section(proposal.settings, [show(remark) for remark in remarks])
    try:
        content = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise TrueupError(f"--output: {path} can't be read: {error}. Give another file.") from error
    text_of_file = merged(content, section, force=force)
    if read_host(text_of_file) != proposal.mapping:
        raise TrueupError(
            f"--output: the text for {path} differs from the mapping, so nothing was written. Report this bug."
        )
    write_file(path, [text_of_file])
    _read_back(proposal, path)
    click.echo(f"Written to {path}. Next: `trueup drift report --read-only`.", err=True)


def _read_back(proposal: Proposal, path: Path) -> None:
    """Check that the next command will read this mapping from the file."""
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
            f"{path} was written, but an environment variable TRUEUP_HOST or TRUEUP_HOST__… overrides it. "
            "Unset the variable."
        )
