"""One log of many processes: every line with its process's name, coloured on a terminal."""

import os
from collections.abc import Sequence
from typing import TextIO

_COLOURS = ("36", "33", "35", "32", "34", "31")  # ANSI foreground colours
_OWN_NAME = "trueup"


class MergedLog:
    """Writes the lines of several processes to one stream."""

    def __init__(self, stream: TextIO, names: Sequence[str]) -> None:
        self._stream = stream
        self._width = max(len(name) for name in (_OWN_NAME, *names))
        coloured = stream.isatty() and "NO_COLOR" not in os.environ
        self._colours = dict(zip(names, _COLOURS * len(names), strict=False)) if coloured else {}
        self.closed = False

    def write(self, name: str, lines: Sequence[str]) -> None:
        """Write the lines of one process; once the reader has gone, they are dropped."""
        if self.closed or not lines:
            return
        prefix = f"{name:<{self._width}} |"
        if name in self._colours:
            prefix = f"\x1b[{self._colours[name]}m{prefix}\x1b[0m"
        try:
            self._stream.write("".join(f"{prefix} {line}\n" for line in lines))
            self._stream.flush()
        except (OSError, ValueError):  # the terminal was closed, or the reader of the pipe has ended
            self.closed = True

    def say(self, message: str) -> None:
        """Write a line of our own."""
        self.write(_OWN_NAME, message.splitlines())
