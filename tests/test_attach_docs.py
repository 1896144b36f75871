"""docs/attach.md is true: its first commands lead from nothing to a report of a Django project's drift, as written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from tests.conftest import cloned_database, settings_for
from tests.hosts.documents import ROOT
from tests.hosts.legacy import Shop
from tests.hosts.running import host_at, plain_url
from tests.support.books import dump
from tests.test_readme import EXAMPLE_URL, find_command
from trueup.stack import StackUrls

MANUAL = (ROOT / "docs" / "attach.md").read_text()
FIRST, _, _ = MANUAL.partition("\n## From nothing to a first report\n")[2].partition("\n## ")
LIMIT_SECONDS = 120


def blocks(language: str, text_of: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of, re.MULTILINE | re.DOTALL)


COMMANDS = [line[2:] for line in blocks("console", FIRST)[0].splitlines()]


def test_the_manual_has_five_commands() -> None:
    assert len(COMMANDS) == 5
    assert COMMANDS[-1].endswith("drift report --read-only")


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash", MANUAL) + blocks("console", MANUAL) for line in block.splitlines()]
)
def test_every_command_of_the_manual_exists_with_its_options(line: str) -> None:
    words = shlex.split(line.removeprefix("$ ").partition("|")[0], comments=True)
    if Path(words[0]).name == "trueup":
        find_command(words[1:])


def test_every_link_leads_to_a_file() -> None:
    for target in (*re.findall(r"\]\(([^)#]+)\)", MANUAL), *re.findall(r"`(tests/[\w/.]+)`", MANUAL)):
        assert any((folder / target).exists() for folder in (ROOT, ROOT / "docs")), target


@dataclass
class Terminal:
    """A shell in a checkout of trueup, independent of this one. `said`: the output of each command."""

    checkout: Path
    environment: dict[str, str]
    url: str
    said: dict[str, str]

    def type(self, command: str) -> None:
        """Run a command as written, except for the example's address. `export` stays for later commands."""
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            assert value == EXAMPLE_URL
            self.environment[name] = self.url
            return
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_SECONDS,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        self.said[command] = done.stdout


@pytest.fixture(scope="module")
def shop(stack: StackUrls, admin_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The database of a Django project with a history, and a role that may read it."""
    folder = tmp_path_factory.mktemp("shop")
    with (
        pytest.MonkeyPatch.context() as patch,
        cloned_database(stack, admin_engine, "template1") as url,
        settings_for(url, stack, patch, folder),
        host_at(url) as host,
    ):
        made = Shop(url=url, folder=folder, host=host)
        made.open()
        [statements] = blocks("sql", FIRST)
        made.psql(statements)
        yield made
    with admin_engine.connect() as connection:
        connection.execute(text("DROP ROLE IF EXISTS reader"))


@pytest.fixture(scope="module")
def terminal(shop: Shop) -> Terminal:
    checkout = shop.folder / "trueup"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks"))
    # Without a network: the packages for pip are in the environment that runs these tests.
    installed = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRUEUP_", "PIP_", "PYTHON"))}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    url = plain_url(make_url(shop.url).set(username="reader").render_as_string(hide_password=False))
    before = dump(shop.host)
    terminal = Terminal(checkout=checkout, environment={**kept, **path, **installed, **offline}, url=url, said={})
    for command in COMMANDS:
        terminal.type(command)
    assert dump(shop.host) == before
    return terminal


def loose(line: str) -> list[str]:
    """Return a line's words, with each number replaced."""
    return re.sub(r"\d[\d,]*", "0", line).split()


def test_the_report_equals_the_manual_s_output(terminal: Terminal) -> None:
    for command, shown in zip(COMMANDS[-2:], blocks("text", FIRST), strict=True):
        said = terminal.said[command]
        lines = [loose(line) for line in said.splitlines()]
        missing = [line for line in shown.splitlines() if line != "…" and loose(line) not in lines]
        assert missing == [], said


def test_the_mapping_is_in_a_file_and_the_report_is_right(terminal: Terminal, shop: Shop) -> None:
    assert "[host]" in (terminal.checkout / "trueup.toml").read_text()
    said = terminal.said[COMMANDS[-1]]
    assert re.search(rf"^counters checked +{shop.host.value('SELECT count(*) FROM billing_subscription')}$", said, re.M)
