"""The clocks of other machines, compared with this machine's clock."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trueup.doctor.findings import Finding, error, ok, warning

SAMPLES = 5
NOTICEABLE_SECONDS = 2.0
# A message of beat expires after about its interval, by the clocks of its sender and its worker.
HARMFUL_SECONDS = 50.0


@dataclass(frozen=True, kw_only=True)
class Offset:
    """The time in seconds by which a clock is ahead of another, and its uncertainty."""

    seconds: float
    uncertainty: float

    def against(self, other: "Offset") -> "Offset":
        """Return the offset between two clocks that were both compared with the same third clock."""
        return Offset(seconds=self.seconds - other.seconds, uncertainty=self.uncertainty + other.uncertainty)


def measure(
    read: Callable[[], float],
    *,
    clock: Callable[[], float] = time.time,
    stopwatch: Callable[[], float] = time.monotonic,
) -> Offset:
    """Compare another clock with this machine's. `read` returns the other clock's seconds since 1970.

    The other clock was read somewhere within the round trip: half of it is subtracted, and is the uncertainty. The
    sample with the shortest round trip is returned.
    """
    offsets = []
    for _ in range(SAMPLES):
        asked, started = clock(), stopwatch()
        seconds = read()
        half = (stopwatch() - started) / 2
        offsets.append(Offset(seconds=seconds - (asked + half), uncertainty=half))
    return min(offsets, key=lambda offset: offset.uncertainty)


def judge(check: str, whose: str, offset: Offset) -> Iterator[Finding]:
    """Yield the finding about an offset. `whose`: both clocks, the subject of the message."""
    detail = {"offset_seconds": round(offset.seconds, 4), "uncertainty_seconds": round(offset.uncertainty, 4)}
    certain = abs(offset.seconds) - offset.uncertainty
    if certain < NOTICEABLE_SECONDS:
        yield ok(check, f"{whose} differ by {abs(offset.seconds):.3f} s (± {offset.uncertainty:.3f}).", **detail)
        return
    what = f"{whose} differ by {abs(offset.seconds):.1f} s (± {offset.uncertainty:.1f})."
    level = error if certain >= HARMFUL_SECONDS else warning
    yield level(check, what, "Synchronize both machines by NTP.", **detail)
