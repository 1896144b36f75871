"""README.md is true: its commands and code run as written, and its names exist."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from celery import Celery

from tests.support.demo import Demo
from tests.support.host import Host
from tests.support.worker import own_application
from trueup.cli import main
from trueup.settings.home import FOLDER
from trueup.settings.settings import CONFIG_VARIABLE, PREFIX, Settings, read_settings
from trueup.stack import running_stack
from trueup.tasks import MeteredTask

ROOT = Path(__file__).parents[1]
EXAMPLE_URL = "postgresql://reader@db.internal:5432/app"
FIRST_REPORT = "trueup drift report --read-only"
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def typed(block: str) -> list[str]:
    return [line[2:] for line in block.splitlines() if line.startswith("$ ")]


# tests/packaging runs the first block, which needs an environment to install into.
FIRST_COMMANDS = typed(blocks("console")[0])
COMMANDS = [command for block in blocks("console")[1:] for command in typed(block)]
OWN_COMMANDS = [command for command in COMMANDS if command.startswith("trueup ")]


def test_the_readme_has_blocks_of_each_kind() -> None:
    assert len(OWN_COMMANDS) > 5
    assert all(blocks(language) for language in ("bash", "toml", "python"))


def test_the_readme_starts_with_installation_a_report_and_five_lines_of_code() -> None:
    assert re.findall(r"^```(\w+)$", README, re.MULTILINE)[:2] == ["console", "python"]
    assert ["pip install trueup", f"export {PREFIX}DATABASE_URL={EXAMPLE_URL}", FIRST_REPORT] == FIRST_COMMANDS
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 5


def test_other_commands_in_the_readme_prepare_ours() -> None:
    [virtual_environment] = re.findall(r"^VENV := (\S+)$", MAKEFILE, re.MULTILINE)
    demo_home = Path(FOLDER) / "demo"
    stage = [command for command in COMMANDS if command not in OWN_COMMANDS and not command.startswith("make ")]
    assert stage == [f"source {virtual_environment}/bin/activate", f"export TRUEUP_HOME={demo_home}"]


def test_every_make_command_in_the_readme_is_a_target() -> None:
    made = re.findall(r"(?:`|^\$ )make ([a-z]+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(made) <= set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


@pytest.fixture(scope="module")
def demo_servers(demo: Demo) -> Iterator[None]:
    """The demo's servers, so that not every command has to start them."""
    with running_stack(Settings(home=demo.home, database_url=None, broker_url=None)):
        yield


@pytest.mark.parametrize("command", OWN_COMMANDS)
def test_a_command_runs_as_written_on_the_demo_s_data(demo: Demo, command: str, request: pytest.FixtureRequest) -> None:
    # The first command starts its servers and stops them again, as the text says of all.
    if command != OWN_COMMANDS[0]:
        request.getfixturevalue("demo_servers")
    expected = re.search(r"# exit code (\d)", command)
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=demo.environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == (int(expected[1]) if expected else 0), result.stdout + result.stderr
    assert result.stdout.strip()
    assert result.stderr == ""


def test_the_report_that_the_readme_shows_is_the_demo_s(demo: Demo) -> None:
    [report] = [block for block in blocks("text") if "missed decrement" in block]
    assert report in demo.output


def find_command(words: list[str]) -> click.Command:
    """Return the command that these words call, after it has parsed the rest as its arguments."""
    command: click.Command = main
    # A command keeps the help options of its first context.
    context = click.Context(main, **main.context_settings)
    while isinstance(command, click.Group):
        found = command.get_command(context, words.pop(0))
        assert found is not None
        command = found
    command.make_context(command.name, words, parent=context)
    return command


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash") for line in block.splitlines() if line.startswith("trueup ")]
)
def test_a_command_for_the_user_s_own_servers_exists_with_its_options(line: str) -> None:
    find_command(line.partition("#")[0].split()[1:])


def test_every_command_and_setting_that_the_text_names_exists() -> None:
    for words in re.findall(r"`trueup ([a-z ]+)`", README):
        command: click.Command | None = main
        for word in words.split():
            assert isinstance(command, click.Group), words
            command = command.get_command(click.Context(command), word)
            assert command is not None, words
    settings = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {CONFIG_VARIABLE}
    assert set(re.findall(rf"\b{PREFIX}[A-Z_]+", README)) <= settings


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target


def test_the_table_lists_the_existing_folders() -> None:
    listed = re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(listed) >= set(packages["only-include"]) - {"examples"}
    assert all((ROOT / folder).is_dir() for folder in listed)


@pytest.mark.parametrize("block", blocks("toml"))
def test_the_settings_file_is_valid(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trueup.toml"
    file.write_text(block)
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    written, host = tomllib.loads(block)["host"], read_settings().host
    assert host.usage_log.table == written["usage_log"]["table"] != "ai_usage_log"
    assert host.usage_log.total_tokens == written["usage_log"]["total_tokens"] != "total_tokens"


@dataclass
class User:
    """A user of the reader's application."""

    pk: int


@pytest.fixture
def celery_app(database: str) -> Celery:
    """The reader's application, set up."""
    return own_application()


def run_block(block: str, **names: Any) -> dict[str, Any]:
    """Run a block as a module of its own. Returns its names."""
    namespace = {"__name__": "readme", **names}
    exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102 - our own
    return namespace


def test_the_decorated_task_spends_from_a_hold(celery_app: Celery, host: Host) -> None:
    [block] = [block for block in blocks("python") if "metered_task" in block]
    [task] = [value for value in run_block(block).values() if isinstance(value, MeteredTask)]
    user = host.subscriber(10_000)
    answer = task.apply(kwargs={"user_id": user, "text": "Orders are sent within two days. " * 20})
    assert isinstance(answer.get(), str)
    hold = host.execute("SELECT * FROM trueup.hold WHERE user_id = :user", user=user).one()
    assert (hold.feature_name, hold.section, hold.tokens_reserved, hold.status) == (
        "Summaries",
        "chat",
        1500,
        "settled",
    )
    assert host.used(user) > 0
    assert host.counter(user) == 10_000 - host.used(user)


def test_the_checks_run_and_name_the_reason(celery_app: Celery, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = [block for block in blocks("python") if "check_tokens_for_function" in block]
    user = host.subscriber(1_500)
    host.log(user, 500)
    names = run_block(block, user=User(pk=user))
    assert (names["original"], names["consumed"], names["remaining"]) == (1_500, 500, 1_000)
    assert capsys.readouterr().out == ""
    host.log(user, 1)
    run_block(block, user=User(pk=user))
    assert capsys.readouterr().out == "insufficient_tokens Insufficient tokens for Export: 1000 needed, 999 available\n"
