"""Progress on a terminal: one line on standard error, which is updated during the work and removed after it."""

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

REDRAW_SECONDS = 0.1
_BAR_WIDTH = 30
_ERASE = "\r\x1b[K"


class StatusLine:
    """A line that each text overwrites. It writes nothing if standard error is no terminal."""

    def __init__(self) -> None:
        self._drawn_at = 0.0
        self._shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Show the text, at most once in `REDRAW_SECONDS`."""
        now = time.monotonic()
        if self._shown and now - self._drawn_at >= REDRAW_SECONDS:
            self._drawn_at = now
            width = shutil.get_terminal_size().columns - 1
            encoding = sys.stderr.encoding or "ascii"
            sys.stderr.write(_ERASE + text[:width].encode(encoding, "replace").decode(encoding))
            sys.stderr.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            sys.stderr.write(_ERASE)
            sys.stderr.flush()


@contextmanager
def status_line() -> Iterator[StatusLine]:
    """Yield a line that is removed when the block ends."""
    line = StatusLine()
    try:
        yield line
    finally:
        line.clear()


class ProgressBar:
    """A progress bar. Any thread may update it."""

    def __init__(self, line: StatusLine, label: str, unit: str) -> None:
        self._line = line
        self._label = label
        self._unit = unit
        self._started_at = time.monotonic()
        self._lock = threading.Lock()

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` units are done."""
        with self._lock:
            self._line.show(progress_text(self._label, self._unit, done, total, time.monotonic() - self._started_at))


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[ProgressBar]:
    """Yield a progress bar that is removed when the block ends. `unit`: a noun in the plural."""
    with status_line() as line:
        yield ProgressBar(line, label, unit)


def progress_text(label: str, unit: str, done: int, total: int, seconds: float) -> str:
    """Return label, bar, counts, speed, elapsed and remaining time. `seconds`: time since the start."""
    share = min(1.0, done / total) if total else 0.0
    full = round(share * _BAR_WIDTH)
    speed = done / seconds if seconds > 0 else 0.0
    left = _clock((total - done) / speed) if speed and total else "-:--:--"
    bar = "━" * full + " " * (_BAR_WIDTH - full)
    return f"{label} {bar} {done:,}/{total:,} {speed:,.0f} {unit}/s {_clock(seconds)} left {left}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))
