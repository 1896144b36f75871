"""`trueup up` starts everything once, stops everything, and cleans up after a `kill -9` of itself."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from tests.stack.helpers import (
    alive,
    eventually,
    finish,
    python,
    server_pids,
    stack_processes,
    stack_settings,
    temporary_home,
)
from trueup.settings.settings import Settings
from trueup.stack import running_stack
from trueup.stack.children import ChildRecords, start_child
from trueup.stack.commands import Command, embedded_settings
from trueup.stack.errors import ChildFailedError, StackAlreadyRunningError
from trueup.stack.supervisor import Policy, about_the_model, run_stack

# `trueup up` with commands of the test's own, and without servers unless "embedded" is requested.
UP = """
import json, sys
from trueup.errors import TrueupError
from trueup.settings.settings import Settings
from trueup.stack.commands import Command
from trueup.stack.supervisor import Policy
from trueup.stack.supervisor import run_stack

home, commands, policy, servers = sys.argv[1:]
urls = {"database_url": "postgresql://db/x", "broker_url": "redis://broker/0"}
try:
    run_stack(
        Settings(home=home, **({} if servers == "embedded" else urls)),
        commands=[Command(name=n, tokens=tuple(t)) for n, t in json.loads(commands).items()],
        policy=Policy(**json.loads(policy)),
    )
except TrueupError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

# Ends on SIGTERM like a worker that finishes its task first. Has a child of its own, like a pool.
POLITE = """
import os, signal, subprocess, sys
child = subprocess.Popen(["sleep", "300"])
def stop(number, frame):
    print("finished my task", flush=True)
    child.kill()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print(f"pids {os.getpid()} {child.pid}", flush=True)
while True: signal.pause()
"""

# Ignores all signals except SIGKILL, and so does its child.
STUBBORN = """
import os, signal, subprocess
for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"])
print(f"pids {os.getpid()} {child.pid}", flush=True)
while True: signal.pause()
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with temporary_home() as folder:
        yield folder


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """PostgreSQL's data folder, made once, because making it takes time."""
    with temporary_home() as folder:
        with running_stack(stack_settings(folder), services=["postgres"]):
            pass
        yield folder / "postgres"


@pytest.fixture
def embedded_home(home: Path, data: Path) -> Path:
    """A home that has its data already."""
    home.mkdir(mode=0o711)
    subprocess.run(["cp", "-a", data, home], check=True)  # the owner is kept
    return home


def up(
    home: Path, commands: dict[str, str], servers: str = "none", **policy: float
) -> AbstractContextManager[subprocess.Popen[str]]:
    table = {name: [sys.executable, "-c", script] for name, script in commands.items()}
    return python(UP, home, json.dumps(table), json.dumps(policy), servers)


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert process.stdout is not None
    seen = ""
    while line := process.stdout.readline():
        seen += line
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"{pattern!r} did not come; the output was:\n{seen}")


def children_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in read_until(process, r"pids (\d+) (\d+)").groups()]


def run_here(home: Path, commands: Sequence[Command], *, output: io.StringIO | None = None, **policy: float) -> str:
    """Run the stack in this process, with servers that are never called, and return its output."""
    output = output or io.StringIO()
    run_stack(
        Settings(home=home, database_url="postgresql://db/x", broker_url="redis://broker/0"),
        commands=commands,
        policy=Policy(**policy),  # type: ignore[arg-type]
        output=output,
    )
    return output.getvalue()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_lets_processes_finish_and_leaves_none(home: Path, how: signal.Signals) -> None:
    with up(home, {"one": POLITE}) as stack:
        pids = children_of(stack)
        output = finish(stack, how)
    assert stack.returncode == 0
    assert "one    | finished my task" in output
    assert not any(map(alive, pids))
    assert ChildRecords(home / "run" / "children.json").read() == []


def test_a_stop_with_the_embedded_servers_leaves_no_process(embedded_home: Path) -> None:
    show = "import os; print(*(os.environ[f'TRUEUP_{name}'] for name in ('MODEL_PROVIDER', 'DATABASE_URL')));" + POLITE
    with up(embedded_home, {"one": show}, "embedded") as stack:
        read_until(stack, r"one    \| offline postgresql\+psycopg://postgres@/trueup\?host=/")
        pids = children_of(stack) + server_pids(embedded_home)
        assert len(pids) == 4
        finish(stack, signal.SIGINT)
    assert stack.returncode == 0
    assert not any(map(alive, pids))


@pytest.mark.parametrize(
    ("values", "said", "variables"),
    [
        ({}, "offline, so answers are made up", {"TRUEUP_MODEL_PROVIDER": "offline"}),
        ({"broker_url": "redis://r"}, "offline, so answers are made up", {"TRUEUP_MODEL_PROVIDER": "offline"}),
        ({"model_provider": "openai"}, "model provider: openai", {}),
        ({"database_url": "postgresql://db/app"}, "AI tasks fail until TRUEUP_MODEL_PROVIDER is set", {}),
        ({"database_url": "postgresql://db/app", "model_provider": "offline"}, "model provider: offline", {}),
    ],
)
def test_the_stack_chooses_a_provider_only_with_the_embedded_database_and_logs_it(
    values: dict[str, str], said: str, variables: dict[str, str]
) -> None:
    settings = Settings(**values)  # type: ignore[arg-type]
    assert embedded_settings(settings) == variables
    assert said in about_the_model(settings)


def test_a_dead_server_is_restarted(embedded_home: Path) -> None:
    with up(embedded_home, {"one": POLITE}, "embedded") as stack:
        children_of(stack)
        before = server_pids(embedded_home)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        read_until(stack, "postgres had died and was started again")
        read_until(stack, "redis had died and was started again")
        assert len(server_pids(embedded_home)) == 2
        assert not set(server_pids(embedded_home)) & set(before)
        finish(stack, signal.SIGINT)
    assert not stack_processes(embedded_home)


def test_a_second_request_ends_the_grace_time(home: Path) -> None:
    with up(home, {"one": STUBBORN}, grace_seconds=300, fast_seconds=0.2) as stack:
        pids = children_of(stack)
        stack.send_signal(signal.SIGINT)
        read_until(stack, "stopping; 300 s")
        output = finish(stack, signal.SIGINT)
    assert "killing what still runs" in output
    assert not any(map(alive, pids))


def test_a_process_that_does_not_stop_is_killed_with_its_children(home: Path) -> None:
    with up(home, {"one": STUBBORN}, grace_seconds=0.2) as stack:
        pids = children_of(stack)
        finish(stack, signal.SIGTERM)
    assert not any(map(alive, pids))


def test_a_dead_process_is_restarted(home: Path) -> None:
    with up(home, {"one": POLITE}, first_pause_seconds=0.05) as stack:
        leader, child = children_of(stack)
        os.kill(leader, signal.SIGKILL)
        read_until(stack, r"one died \(ended by SIGKILL\), 1 of 5 times")
        again, _child = children_of(stack)
        assert again != leader
        eventually(lambda: not alive(child))
        finish(stack, signal.SIGINT)


def test_a_process_that_dies_too_often_ends_the_stack_with_its_last_lines(home: Path) -> None:
    dying = Command(name="one", tokens=("sh", "-c", "echo no such queue; exit 3"))
    other = Command(name="two", tokens=("sleep", "300"))
    with pytest.raises(ChildFailedError, match=r"exit code 3.*\n.*no such queue") as caught:
        run_here(home, [dying, other], failures_allowed=3, first_pause_seconds=0.05)
    assert caught.value.service == "one"
    assert "died 3 times" in str(caught.value)


def test_the_stack_runs_on_without_an_optional_process_that_dies_too_often(home: Path, tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    page = Command(name="page", tokens=("sh", "-c", f"echo address taken | tee -a {deaths}; exit 3"), is_optional=True)
    # It goes on until the page has died for the last time, and then ends the stack.
    wait = f'until [ "$(wc -l < {deaths})" -ge 3 ]; do sleep 0.05; done; exit 4'
    output = io.StringIO()
    with pytest.raises(ChildFailedError, match="exit code 4") as caught:
        run_here(
            home,
            [page, Command(name="one", tokens=("sh", "-c", wait))],
            output=output,
            failures_allowed=3,
            first_pause_seconds=0.05,
        )
    assert caught.value.service == "one"
    assert "page died 3 times (exit code 3) and is not started again" in output.getvalue()
    assert deaths.read_text().count("taken") == 3


def test_a_command_that_does_not_exist_is_named(home: Path) -> None:
    with pytest.raises(ChildFailedError, match="no-such-program"):
        run_here(home, [Command(name="one", tokens=("no-such-program",))], failures_allowed=1)


def test_a_second_stack_is_refused_with_the_pid_of_the_first(home: Path) -> None:
    with up(home, {"one": POLITE}) as first:
        children_of(first)
        with pytest.raises(StackAlreadyRunningError, match=f"kill {first.pid}") as caught:
            run_here(home, [])
        assert caught.value.pid == first.pid
        with up(home, {"one": POLITE}) as second:
            assert "StackAlreadyRunningError" in finish(second)
        assert second.returncode == 1
        finish(first, signal.SIGINT)


def test_after_kill_9_the_next_start_ends_the_old_processes_and_adopts_the_servers(
    embedded_home: Path,
) -> None:
    with up(embedded_home, {"one": POLITE, "two": STUBBORN}, "embedded") as killed:
        old = children_of(killed) + children_of(killed)
        server = server_pids(embedded_home)
        finish(killed, signal.SIGKILL)
    assert all(map(alive, old + server))

    with up(embedded_home, {"one": POLITE}, "embedded", grace_seconds=0.5) as stack:
        read_until(stack, r"ending (one|two) \(process \d+\), left by a killed")
        new = children_of(stack)
        assert not any(map(alive, old))
        assert server_pids(embedded_home) == server
        finish(stack, signal.SIGINT)
    assert not any(map(alive, new))
    assert not stack_processes(embedded_home)


def test_the_orphans_of_a_dead_worker_are_ended(home: Path) -> None:
    with up(home, {"one": POLITE}) as killed:
        leader, orphan = children_of(killed)
        finish(killed, signal.SIGKILL)
    os.kill(leader, signal.SIGKILL)
    eventually(lambda: not alive(leader))
    assert alive(orphan)
    with up(home, {"one": POLITE}) as stack:
        children_of(stack)
        assert not alive(orphan)
        finish(stack, signal.SIGINT)


def test_a_foreign_process_with_a_recorded_pid_is_not_signalled(home: Path) -> None:
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as stranger:
        created = psutil.Process(stranger.pid).create_time()
        record = {"name": "one", "pid": stranger.pid, "create_time": created - 3600}
        (home / "run").mkdir(parents=True)
        (home / "run" / "children.json").write_text(json.dumps([record]))
        with up(home, {"one": POLITE}) as stack:
            children_of(stack)
            finish(stack, signal.SIGINT)
        assert stranger.poll() is None
        stranger.kill()


def test_no_program_runs_before_it_is_on_record(home: Path, tmp_path: Path) -> None:
    class Full(ChildRecords):
        def add(self, record: object) -> None:
            raise OSError(28, "No space left on device")

    proof = tmp_path / "ran"
    command = Command(name="one", tokens=("touch", str(proof)))
    with pytest.raises(OSError, match="No space left"):
        start_child(command, dict(os.environ), Full(tmp_path / "children.json"))
    assert not proof.exists()


def test_the_stack_stops_when_the_reader_of_its_output_has_ended(home: Path) -> None:
    chatty = "import time\nwhile True: print('still here', flush=True); time.sleep(0.01)"
    with up(home, {"one": chatty}) as stack:
        read_until(stack, "still here")
        assert stack.stdout is not None
        stack.stdout.close()
        eventually(lambda: stack.poll() is not None)
    assert ChildRecords(home / "run" / "children.json").read() == []


def test_lines_are_coloured_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from trueup.stack.supervisor import MergedLog

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    plain, coloured = io.StringIO(), Terminal()
    for stream in (plain, coloured):
        MergedLog(stream, ["worker"]).write("worker", ["hello"])
    assert plain.getvalue() == "worker | hello\n"
    assert coloured.getvalue() == "\x1b[36mworker |\x1b[0m hello\n"
