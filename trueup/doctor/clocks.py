"""Clocks of other machines, compared with this one's."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trueup.doctor.findings import Finding, error, ok, warning

SAMPLES = 5
NOTICEABLE_SECONDS = 2.0
# A message of beat's lives for about as long as its interval, by the clocks of who sends and who takes it.
HARMFUL_SECONDS = 50.0


@dataclass(frozen=True, kw_only=True)
class Offset:
    """How far a clock is ahead of another, in seconds, and by how much that may be wrong."""

    seconds: float
    uncertainty: float

    @property
    def at_least(self) -> float:
        return max(0.0, abs(self.seconds) - self.uncertainty)

    def against(self, other: "Offset") -> "Offset":
        """Return how far this clock is ahead of the other's, both having been compared with the same one."""
        return Offset(seconds=self.seconds - other.seconds, uncertainty=self.uncertainty + other.uncertainty)


def measure(
    read: Callable[[], float],
    *,
    clock: Callable[[], float] = time.time,
    stopwatch: Callable[[], float] = time.monotonic,
) -> Offset:
    """Compare another clock with ours: `read` asks for its seconds since 1970. The quickest of a few answers says most.

    The answer was given at some time between asking and hearing: half of the round trip is taken off.
    """
    offsets = []
    for _ in range(SAMPLES):
        asked, started = clock(), stopwatch()
        told = read()
        half = (stopwatch() - started) / 2
        offsets.append(Offset(seconds=told - (asked + half), uncertainty=half))
    return min(offsets, key=lambda offset: offset.uncertainty)


def judge(check: str, whose: str, offset: Offset) -> Iterator[Finding]:
    """Yield what it means. `whose`: "the database's clock and this machine's", say."""
    detail = {"offset_seconds": round(offset.seconds, 4), "uncertainty_seconds": round(offset.uncertainty, 4)}
    if offset.at_least < NOTICEABLE_SECONDS:
        yield ok(check, f"{whose} differ by {abs(offset.seconds):.3f} s (± {offset.uncertainty:.3f}).", **detail)
        return
    what = f"{whose} differ by {abs(offset.seconds):.1f} s (± {offset.uncertainty:.1f})."
    remedy = "Let both machines keep time by NTP."
    yield (error if offset.at_least >= HARMFUL_SECONDS else warning)(check, what, remedy, **detail)
