"""The tests marked `dated`, played at other times and in other time zones: `make test-long`.

libfaketime moves the clock of the tests' process, and of the servers and workers that it starts. Each time is shortly
before midnight, so that the tests run into the next day.
"""

import os
import subprocess
import sys
from calendar import isleap
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_clocks import MOMENT

ROOT = Path(__file__).parents[1]
PLAY_SECONDS = 1200
FOLDERS = ("/usr/lib", "/usr/local/lib", "/usr/lib64")


def _before_midnight(year: int, month: int, day: int) -> datetime:
    return datetime(year, month, day, 23, 59, 30, tzinfo=UTC)


def _leap_year_after(now: datetime) -> int:
    return next(year for year in range(now.year + 1, now.year + 9) if isleap(year))


MOMENTS: dict[str, Callable[[datetime], datetime]] = {
    "the year's end": lambda now: _before_midnight(now.year + 1, 12, 31),
    "28 February of a leap year": lambda now: _before_midnight(_leap_year_after(now), 2, 28),
    "29 February": lambda now: _before_midnight(_leap_year_after(now), 2, 29),
    "ten years on": lambda now: now + timedelta(days=3652),
}
# POSIX reverses the sign: 14 hours ahead of UTC, and 12 hours behind it.
ZONES = {"+14": "Etc/GMT-14", "-12": "Etc/GMT+12"}


def _libraries() -> Iterator[Path]:
    """Yield the possible paths of libfaketime: from its wheel, or from the system's package."""
    if (wheel := find_spec("libfaketime")) and wheel.origin:
        yield from Path(wheel.origin).parent.glob("vendor/libfaketime/src/libfaketime.so.1")
    for folder in FOLDERS:
        yield from sorted(Path(folder).glob("**/faketime/libfaketime.so.1"))


def _library() -> Path:
    library = next(_libraries(), None)
    if library is None or not sys.platform.startswith("linux"):
        pytest.skip("libfaketime is not here, so no clock can be moved; install it with: apt-get install libfaketime")
    return library


def _play(**environment: str) -> None:
    """Run the dated tests in a process of their own, with these variables."""
    dated = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.dated" in path.read_text()]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    played = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "dated and not long", "-p", "no:cacheprovider", *dated],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PLAY_SECONDS,
    )
    assert played.returncode == 0, f"{played.stdout[-10_000:]}\n{played.stderr[-2_000:]}"


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_dated_tests_pass_at(moment: str) -> None:
    library = _library()
    now = datetime.now(UTC)
    begins = MOMENTS[moment](now)
    _play(
        LD_PRELOAD=str(library),
        FAKETIME=f"+{int((begins - now).total_seconds())}",
        FAKETIME_DONT_FAKE_MONOTONIC="1",  # timeouts use the monotonic clock, which must not move
        TZ="UTC",
        **{MOMENT: (begins - timedelta(seconds=1)).isoformat()},
    )


@pytest.mark.long
@pytest.mark.parametrize("zone", ZONES)
def test_the_dated_tests_pass_in_the_zone(zone: str) -> None:
    _play(TZ=ZONES[zone])
