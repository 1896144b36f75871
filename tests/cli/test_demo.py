"""`trueup demo`: every step succeeds, and no process is left. On its data, `trueup run --wait` without a worker.

The command starts a temporary worker, and leaves no process.
"""

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.conftest import assert_nothing_runs, started
from tests.support.demo import Demo, processes_of
from tests.support.waiting import wait_for
from trueup.cli.demo.tenants import DENIED
from trueup.settings.settings import Settings
from trueup.stack import running_stack
from trueup.stack.children import ChildRecords
from trueup.stack.processes import is_alive
from trueup.stack.temporary import GRACE_SECONDS

ARTICLE = Path(__file__).parents[2] / "examples" / "help_en.txt"
RUN = ("run", "qa", "--user", 1, "--max-pairs", 2, "--wait", ARTICLE)
RUN_SECONDS = 60.0


def worker_pid(home: Path) -> int:
    """Return the temporary worker's pid once it is on record."""
    records = ChildRecords(home / "run" / "temporary-worker.json")
    return wait_for(records.read, "a temporary worker is on record", seconds=RUN_SECONDS)[0].pid


def test_the_demo_succeeds(demo: Demo) -> None:
    assert (demo.code, demo.errors) == (0, "")


@pytest.mark.parametrize(
    "line",
    [
        ("without-the-gate", " 2,400 ", "2 of 2", " 3,600 ", " 1,200 ", "$1.20"),
        ("with-the-gate", " 2,400 ", "1 of 2", " 0 ", "$0.00"),
        ("Q&A, English article", "4 pairs"),
        ("Q&A, Persian article", "4 pairs"),
        ("Products, page with JSON-LD", " 0 ", "5 products (json-ld)", "64.90 GBP"),
        ("Products, page without", "4 products (model)", "24.50 EUR"),
        ("DM about a product", "sent"),
        ("DM, fixed text", " 0 ", "sent"),
        *((tenant.name, reason) for reason, tenant in DENIED.items()),
        ("north-street-bakery: shows 3,580, has 2,400",),
        ("lale-flowers: shows 6,410, has 7,050",),
        ("3,580", "2,400", "1,180", "missed decrement", "proven", "corrected"),
        ("6,410", "7,050", "-640", "double decrement", "proven", "corrected"),
        (" 600 ", " 0 ", "missed decrement", "proven", "corrected"),
    ],
    ids=lambda line: line[0],
)
def test_the_demo_shows_each_step(demo: Demo, line: tuple[str, ...]) -> None:
    assert any(all(part in shown for part in line) for shown in demo.output.splitlines()), demo.output


def test_each_next_step_of_the_demo_works_as_pasted(demo: Demo, tmp_path: Path) -> None:
    [_, steps] = demo.output.split("Next:\n")
    [stage, *commands] = steps.strip().splitlines()
    assert stage == f"export TRUEUP_HOME={demo.home}"
    written = [command.strip().partition("    # ")[0] for command in commands]
    script = "\n".join([stage, *(command for command in written if not command.endswith(" up"))])
    with running_stack(Settings(home=demo.home, database_url=None, broker_url=None)):
        run = subprocess.run(
            ["bash", "-ec", script], cwd=tmp_path, env=demo.environment, capture_output=True, text=True, check=False
        )
    assert run.returncode == 0, run.stderr


def test_the_demo_leaves_nothing_running(demo: Demo) -> None:
    assert_nothing_runs(demo.home)


def test_ctrl_c_ends_the_waiting_its_worker_and_its_servers(demo: Demo) -> None:
    for _ in range(5):  # on a busy machine the result may come before the signal
        with started(*RUN, home=demo.home) as command:
            worker_pid(demo.home)
            os.killpg(command.pid, signal.SIGINT)
            output, errors = command.communicate(timeout=GRACE_SECONDS + RUN_SECONDS)
        if command.returncode != 0:
            break
    assert (command.returncode, output) == (1, "")
    assert "is not cancelled" in errors
    assert "Traceback" not in errors
    assert_nothing_runs(demo.home)


def test_two_commands_share_a_worker_and_end_the_processes_of_a_killed_command(demo: Demo) -> None:
    with started(*RUN, home=demo.home) as killed:
        pid = worker_pid(demo.home)
        killed.kill()
        killed.wait()
    left = [process for process in processes_of(demo.home) if process.pid == pid]
    assert [is_alive(process) for process in left] == [True]

    with ExitStack() as stack:
        for command in [stack.enter_context(started(*RUN, home=demo.home)) for _ in range(2)]:
            output, errors = command.communicate(timeout=RUN_SECONDS)
            assert (command.returncode, errors) == (0, "")
            assert '"pairs"' in output
    assert not is_alive(left[0])
    assert_nothing_runs(demo.home)
