"""`trueup demo`: every step succeeds, and no process is left."""

import pytest

from tests.cli.conftest import assert_nothing_runs
from tests.support.demo import Demo
from trueup.cli.demo.tenants import DENIED


def test_the_demo_succeeds(demo: Demo) -> None:
    assert (demo.code, demo.errors) == (0, "")


@pytest.mark.parametrize(
    "line",
    [
        ("Q&A, English article", "4 pairs"),
        ("Q&A, Persian article", "4 pairs"),
        ("Products, page with JSON-LD", " 0 ", "5 products (json-ld)", "64.90 GBP"),
        ("Products, page without", "4 products (model)", "24.50 EUR"),
        ("DM about a product", "sent"),
        ("DM, fixed text", " 0 ", "sent"),
        *((tenant.name, reason) for reason, tenant in DENIED.items()),
        ("north-street-bakery: shows 3,580, has 2,400",),
        ("lale-flowers: shows 6,410, has 7,050",),
        ("3,580", "2,400", "1,180", "missed decrement", "corrected"),
        ("6,410", "7,050", "-640", "double decrement", "corrected"),
    ],
    ids=lambda line: line[0],
)
def test_the_demo_shows_each_step(demo: Demo, line: tuple[str, ...]) -> None:
    assert any(all(part in shown for part in line) for shown in demo.output.splitlines()), demo.output


def test_the_demo_leaves_nothing_running(demo: Demo) -> None:
    assert_nothing_runs(demo.home)
