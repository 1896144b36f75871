"""Requests to stop, as the signals that bring them."""

import signal
from types import FrameType, TracebackType
from typing import Self

_KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequests:
    """Counts Ctrl-C, SIGTERM and SIGHUP while its block runs; main thread only.

    They only count and never raise, so that no start and no stop is torn in the middle.
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        self._previous = {kind: signal.signal(kind, self._note) for kind in _KINDS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
