"""`trueup find-unmetered`: list the places where a maker's SDK works without trueup's HTTP client."""

from pathlib import Path

import click

from trueup.cli import EXIT_ERROR
from trueup.cli.options import json_option
from trueup.cli.output import print_json, print_table


@click.command("find-unmetered")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@json_option
@click.pass_context
def find_unmetered(ctx: click.Context, path: Path, as_json: bool) -> None:
    """List where the code in PATH calls a model without trueup.

    It reads Python files and runs none of their code. It finds clients of OpenAI, Anthropic, Gemini, pydantic-ai,
    LangChain and LlamaIndex without trueup's HTTP client, calls of LiteLLM, and WebSockets. Exit code 1: it found some.

    \b
    Example:
      trueup find-unmetered src
    """
    from trueup.llm.transport.unmetered import find_unmetered as find

    found = find(path)
    if as_json:
        print_json({"calls": found})
    else:
        rows = [(f"{call.file}:{call.line}", call.call, call.remedy) for call in found]
        print_table(("place", "call", "remedy"), rows, empty=f"No unmetered call was found in {path}.")
    if found:
        ctx.exit(EXIT_ERROR)
