"""The provider's own book: every request it took, what it bills for it, and whether the answer was sent whole."""

import threading
import time
from collections import Counter
from dataclasses import dataclass


@dataclass(kw_only=True)
class Serving:
    """One request served. `asked`: the most tokens it may cost, prompt and answer; `billed`: what it does cost.

    `pid`: the process that asked. `complete`: the whole answer went out. Times are of the monotonic clock.
    """

    serial: int
    task_id: str
    call: int
    user_id: int
    pid: int
    behaviour: str
    asked: int
    started_at: float
    billed: int = 0
    complete: bool = False
    ended_at: float | None = None

    @property
    def model_name(self) -> str:
        """What the answer gives as its model: charges and log rows keep it, and so name the serving they record."""
        return f"fake-{self.serial}"

    @property
    def over(self) -> int:
        """Count of tokens billed beyond what was asked for."""
        return max(0, self.billed - self.asked)


class Ledger:
    """All servings of a round; the provider's threads write it, the round reads it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servings: list[Serving] = []
        self._times: Counter[tuple[str, int]] = Counter()

    def open(self, *, task_id: str, call: int, user_id: int, pid: int, asked: int) -> tuple[Serving, int]:
        """Enter a request. Returns it, and how often its call has come before."""
        with self._lock:
            times = self._times[task_id, call]
            self._times[task_id, call] += 1
            serving = Serving(
                serial=len(self._servings) + 1,
                task_id=task_id,
                call=call,
                user_id=user_id,
                pid=pid,
                behaviour="ok",
                asked=asked,
                started_at=time.monotonic(),
            )
            self._servings.append(serving)
            return serving, times

    def servings(self) -> list[Serving]:
        with self._lock:
            return list(self._servings)

    def in_flight(self) -> list[Serving]:
        """Return the requests that wait for their answers now, oldest first."""
        return [serving for serving in self.servings() if serving.ended_at is None]
