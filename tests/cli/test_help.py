"""Every command has help, and none reads the environment before it is called."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.cli.conftest import trueup
from trueup.cli import COMMANDS, main

README = (Path(__file__).parents[2] / "README.md").read_text()


def walk(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command below the group, groups too, with the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from walk(command, (*path, name))


TREE = dict(walk(main))
LEAVES = {path: command for path, command in TREE.items() if not isinstance(command, click.Group)}


def test_the_walk_finds_the_commands() -> None:
    assert {path[0] for path in TREE} == set(COMMANDS)
    assert ("run", "dm") in LEAVES


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    help_text = trueup(*path, "--help").stdout
    assert help_text.startswith(f"Usage: main {' '.join(path)} [OPTIONS]")
    assert TREE[path].help
    assert trueup(*path, "-h").stdout == help_text


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_every_command_and_group_has_an_example_that_calls_it(path: tuple[str, ...]) -> None:
    help_text = trueup(*path, "--help").stdout
    _, _, example = help_text.partition("Example:\n")
    assert f"trueup {' '.join(path)}" in example.partition("Options:")[0]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_option_is_explained(path: tuple[str, ...]) -> None:
    for parameter in LEAVES[path].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_is_in_the_readme_or_in_the_help_above_it(path: tuple[str, ...]) -> None:
    above = trueup(*path[:-1], "--help").stdout.partition("Commands:")[2]
    assert f"trueup {' '.join(path)}" in README or path[-1] in above.split()


def test_without_a_command_the_help_is_shown_and_an_unknown_one_is_wrong_usage() -> None:
    assert "Commands:" in CliRunner().invoke(main, []).output
    assert "No such command 'tokns'" in trueup("tokns", code=2).stderr


def test_the_version_is_shown() -> None:
    assert trueup("--version").stdout.startswith("trueup, version ")


LOOK = """
import importlib, os, pkgutil, sys
sys.addaudithook(lambda event, args: event == "socket.connect" and sys.exit("connects at import"))
import trueup.settings.settings, trueup.cli
trueup.settings.settings.read_settings = lambda: sys.exit("reads the settings at import")
for module in pkgutil.walk_packages(trueup.cli.__path__, "trueup.cli."):
    importlib.import_module(module.name)
"""


def test_importing_the_commands_reads_no_settings() -> None:
    # A misspelt variable ends each command that reads the settings.
    result = subprocess.run(
        [sys.executable, "-c", LOOK],
        env=os.environ | {"TRUEUP_WRONG": "x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["--help"], {"celery", "pydantic", "sqlalchemy"}),
        (["settings"], {"celery", "psycopg", "sqlalchemy"}),
        # The templates, the evidence and the metered tasks are for other commands.
        (["status", "--help"], {"celery", "jinja2", "trueup.drift", "trueup.gate.holds"}),
        (["up", "--help"], {"alembic"}),
        (["run", "--help"], {"alembic", "httpx"}),
    ],
)
def test_a_command_loads_nothing_that_it_does_not_use(arguments: list[str], unused: set[str]) -> None:
    loaded = set(ast.literal_eval(after_a_command(arguments, "[*sys.modules]")))
    assert "click" in loaded
    assert not unused & loaded


@pytest.mark.parametrize("is_whole_process", [True, False])
def test_a_command_leaves_imports_out_of_garbage_collection_if_it_is_the_whole_process(is_whole_process: bool) -> None:
    shown = after_a_command(
        ["status", "--help"], "gc.get_freeze_count() > 10_000, gc.isenabled()", is_whole_process=is_whole_process
    )
    assert shown == f"{is_whole_process} True"


def after_a_command(arguments: list[str], shown: str, *, is_whole_process: bool = False) -> str:
    """Run a command, then show something in the same process. Returns what is shown."""
    script = f"""
import gc, sys
from trueup.cli import main
try:
    main({arguments}, standalone_mode={is_whole_process})
except SystemExit:
    pass
print({shown})
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRUEUP_")}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1]
