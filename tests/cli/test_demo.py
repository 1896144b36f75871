"""`trueup demo`: every step succeeds, and no process is left."""

import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import assert_nothing_runs
from tests.support.demo import Demo
from trueup.cli.demo.tenants import DENIED
from trueup.settings.settings import Settings
from trueup.stack import running_stack


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
