"""Only the database's clock decides, and a date in a test is never reached."""

import ast
import os
import re
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import Engine, text

from tests.support.host import START
from trueup.stack import StackUrls

ROOT = Path(__file__).parents[1]
DECIDING = ("accounts", "billing", "drift", "gate", "install", "monitoring", "reconcile", "reports", "review", "usage")
CLOCKS = {("datetime", "now"), ("datetime", "utcnow"), ("date", "today"), ("time", "time"), ("time", "time_ns")}
DATE = re.compile(r"\b(20\d\d)-(\d\d)-(\d\d)(?!\d)|\bdate(?:time)?\((20\d\d), (\d+), (\d+)")
MOMENT = "TESTS_PLAYED_FROM"
"""Set by tests/test_moments.py: when the tests begin, by the moved clock."""


def _clock_readings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in CLOCKS
        ):
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.id}.{node.attr}"


def test_decisions_use_only_the_database_s_clock() -> None:
    """Workers on machines whose clocks differ, and triggers in the database, must agree on the order of events."""
    paths = [path for room in DECIDING for path in (ROOT / "trueup" / room).rglob("*.py")]
    assert len(paths) > 50
    assert [reading for path in paths for reading in _clock_readings(path)] == []


def _dates(source: str) -> Iterator[date]:
    for found in DATE.finditer(source):
        try:
            yield date(*(int(part) for part in found.groups() if part))
        except ValueError:
            continue  # a wrong date is meant


def test_a_date_in_a_test_lies_in_the_past_or_is_never_reached() -> None:
    """A test whose date is reached fails on that day, on any machine."""
    today = datetime.now(UTC).date()
    found = {path: list(_dates(path.read_text())) for path in sorted((ROOT / "tests").rglob("*.py"))}
    assert sum(map(len, found.values())) > 20
    early = {
        f"{path.relative_to(ROOT)}: {day}"
        for path, days in found.items()
        for day in days
        if today <= day < date(2900, 1, 1)
    }
    assert early == set()
    assert START + timedelta(days=365) < datetime.now(UTC), "tests count on from START for some months"


@pytest.mark.dated
def test_python_and_its_servers_tell_the_same_time(stack: StackUrls, admin_engine: Engine) -> None:
    """A moved clock is moved for all of them."""
    with admin_engine.connect() as connection:
        of_database = connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))
    assert stack.broker_url is not None
    with Redis(unix_socket_path=stack.broker_url.removeprefix("redis+socket://")) as redis:
        seconds, microseconds = redis.time()
    of_redis = seconds + microseconds / 1e6
    here = time.time()
    assert here == pytest.approx(float(of_database or 0), abs=30)
    assert here == pytest.approx(of_redis, abs=30)
    if begins := os.environ.get(MOMENT):
        assert timedelta() <= datetime.now(UTC) - datetime.fromisoformat(begins) < timedelta(hours=1)
