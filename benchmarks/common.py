"""Shared parts of the benchmarks: a stack of their own, interleaved measurements, tables."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trueup.database.engine import dispose_engine
from trueup.settings.settings import PREFIX, Settings, get_settings
from trueup.stack import StackUrls, running_stack

ROUNDS = 5


@contextmanager
def own_stack() -> Iterator[StackUrls]:
    """Run a fresh PostgreSQL and Redis, to which the settings of this process and its children point."""
    folder = Path(tempfile.mkdtemp(prefix="trueup-bench-"))
    folder.chmod(0o711)
    for variable in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[variable]
    try:
        with running_stack(Settings(home=folder / "home")) as urls:
            os.environ["TRUEUP_DATABASE_URL"] = str(urls.database_url)
            os.environ["TRUEUP_BROKER_URL"] = str(urls.broker_url)
            os.environ["TRUEUP_HOME"] = str(folder / "home")
            os.environ["TRUEUP_MODEL_PROVIDER"] = "offline"
            get_settings.cache_clear()
            try:
                yield urls
            finally:
                dispose_engine()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def interleaved(ways: dict[str, Callable[[int], None]], repeats: int, *, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median seconds of one call of each way. Each round calls all of them, one after the other.

    Each call gets a number that is never used twice.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    number = 0
    for way in ways.values():  # once unmeasured, which makes plans and prepares statements
        for _ in range(20):
            number += 1
            way(number)
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in range(repeats):
                number += 1
                way(number)
            taken[name].append((time.perf_counter() - started) / repeats)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def print_markdown(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in the format of docs/performance.md."""
    print(f"\n### {title}\n")  # noqa: T201 - what a benchmark is for
    for row in (headings, ["---"] * len(headings), *rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")  # noqa: T201


def micros(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs"
