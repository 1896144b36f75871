"""Progress on a terminal: one line on standard error, which is updated during the work and removed after it."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

REDRAW_SECONDS = 0.1
_BAR_WIDTH = 30
_ERASE = "\r\x1b[K"


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a text on the line, at most once in `REDRAW_SECONDS`, and only on a terminal."""
    shown_at = 0.0
    is_terminal = sys.stderr.isatty()

    def show(text: str) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if is_terminal and now - shown_at >= REDRAW_SECONDS:
            shown_at = now
            width = shutil.get_terminal_size().columns - 1
            encoding = sys.stderr.encoding or "ascii"
            _write(_ERASE + text[:width].encode(encoding, "replace").decode(encoding))

    try:
        yield show
    finally:
        if is_terminal:
            _write(_ERASE)


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many units of a total are done. Any thread may call it. `unit`: a plural noun."""
    started_at = time.monotonic()
    lock = threading.Lock()
    with status_line() as show:

        def update(done: int, total: int) -> None:
            with lock:
                show(progress_text(label, unit, done, total, time.monotonic() - started_at))

        yield update


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
