"""A streamed answer on its way to the caller: it is read as it passes, and charged however it ends."""

import json
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from trueup.llm.formats.reading import parsed
from trueup.llm.transport.purchases import Purchase, stored

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE = re.compile(rb"\r\n|\n|\r")

# No event is so long. A stream without blank lines is passed on, and not read any more.
_MAX_EVENT_BYTES = 16 * 2**20

# The usage of a long answer is in its last bytes.
_USAGE_BYTES = 65_536
_USAGE = re.compile(rb'"(usage|usageMetadata)"\s*:\s*')

# zlib reads the header itself: gzip or zlib.
_ANY_DEFLATE = 47
_DECODED = ("gzip", "deflate")


class Tap:
    """Reads one stream of server-sent events.

    `encoding`: the stream's content encoding; empty: none. `close_source`: closes the connection, from any thread.
    """

    def __init__(
        self, purchase: Purchase, content_type: str, encoding: str, close_source: Callable[[], object], keep_bytes: int
    ) -> None:
        self.purchase = purchase
        self.decodes = encoding in _DECODED
        self.is_readable = self.decodes or encoding in ("", "identity")
        self._decoder: Any = zlib.decompressobj(_ANY_DEFLATE) if self.decodes else None
        self._hides = purchase.adds_usage and self.is_readable
        self._content_type = content_type
        self._close_source = close_source
        self._pending = b""
        self._passed: list[bytes] = []  # what a replay gives; empty once it is too much to keep
        self._room = keep_bytes
        purchase.call.running.add_stream(self)

    @property
    def rewrites(self) -> bool:
        """True if the caller gets the bytes decoded, because events are taken out."""
        return self._hides and self.decodes

    @property
    def is_due(self) -> bool:
        """True once the answer is complete and not charged yet."""
        return self.purchase.reader.is_complete and not self.purchase.is_settled

    def feed(self, part: bytes) -> bytes:
        """Read a part of the body, and return what the caller gets of it now.

        Raises `NoHoldError` if the hold has ended: what follows would not be charged.
        """
        if self.purchase.is_settled and not self.purchase.reader.is_complete:
            self.purchase.call.running.refuse_if_over()
        if not self.is_readable:
            return part
        data = part if self._decoder is None else self._decoded(part)
        passed = self._read(data)
        return passed if self._hides else part

    def end(self) -> bytes:
        """Note that the body has ended, and return what was kept back of it."""
        rest = self._pending
        self._pending = b""
        if rest and self._read_event(rest):
            rest = b""
        self._keep(rest)
        self.purchase.reader.end()
        return rest if self._hides else b""

    def settle(self, error: BaseException | None = None) -> None:
        """Charge the received part. `error`: the connection broke. A second call does nothing."""
        reader = self.purchase.reader
        if error is not None and not reader.has_begun:
            self.purchase.fail(unknown=True, error_type=type(error).__name__)
        else:
            whole = b"".join(self._passed) if reader.is_complete and self._room >= 0 and self._passed else None
            self.purchase.settle(None if whole is None else stored(200, self._content_type, whole))
        self.purchase.call.running.remove_stream(self)

    def close(self) -> None:
        """End the stream: the hold's end calls this. The received part is charged."""
        try:
            self.settle()
        finally:
            with suppress(Exception):  # another thread may be reading the connection
                self._close_source()

    def _decoded(self, part: bytes) -> bytes:
        try:
            data: bytes = self._decoder.decompress(part)
        except zlib.error:
            self.is_readable = False
            return b""
        return data

    def _read(self, data: bytes) -> bytes:
        """Read the events that are complete by now. Returns the part for the caller."""
        self._pending += data
        passed, start = [], 0
        for blank in _BLANK_LINE.finditer(self._pending):
            event = self._pending[start : blank.end()]
            start = blank.end()
            if not self._read_event(event):
                passed.append(event)
        self._pending = self._pending[start:]
        if len(self._pending) > _MAX_EVENT_BYTES:
            passed.append(self._pending)
            self._pending, self.is_readable = b"", False
        joined = b"".join(passed)
        self._keep(joined)
        return joined

    def _read_event(self, event: bytes) -> bool:
        """Read one event. Returns True if the caller must not see it."""
        name, lines = None, []
        for line in _LINE.split(event):
            if line.startswith(b"data:"):
                lines.append(line[5:].lstrip(b" "))
            elif line.startswith(b"event:"):
                name = line[6:].strip().decode("ascii", "replace")
        if not lines:
            return False
        data = b"\n".join(lines)
        value = "[DONE]" if data.strip() == b"[DONE]" else parsed(data)
        return self.purchase.reader.add(name, value) and self._hides

    def _keep(self, data: bytes) -> None:
        self._room -= len(data)
        if self._room >= 0:
            self._passed.append(data)
        else:
            self._passed = []


class LongAnswer:
    """Reads an answer that is too long to be kept, such as thousands of embeddings: its usage is at its end."""

    def __init__(self, purchase: Purchase, encoding: str, close_source: Callable[[], object]) -> None:
        self.purchase = purchase
        self.is_due = False
        self._decoder: Any = zlib.decompressobj(_ANY_DEFLATE) if encoding in _DECODED else None
        self._close_source = close_source
        self._end = b""
        purchase.call.running.add_stream(self)

    def feed(self, part: bytes) -> bytes:
        """Read a part of the body, and return it. Raises `NoHoldError` if the hold has ended."""
        if self.purchase.is_settled:
            self.purchase.call.running.refuse_if_over()
        with suppress(zlib.error):
            data = part if self._decoder is None else self._decoder.decompress(part)
            self._end = (self._end + data)[-_USAGE_BYTES:]
        return part

    def end(self) -> bytes:
        """Note that the body has ended."""
        for found in _USAGE.finditer(self._end):
            with suppress(ValueError):
                text = self._end[found.end() :].decode(errors="replace")
                value, _ = json.JSONDecoder().raw_decode(text)
                self.purchase.reader.add(None, {found.group(1).decode(): value})
        self.purchase.reader.end()
        return b""

    def settle(self, error: BaseException | None = None) -> None:
        """Charge the answer. `error`: the connection broke. A second call does nothing."""
        self.purchase.settle()
        self.purchase.call.running.remove_stream(self)

    def close(self) -> None:
        """End the answer: the hold's end calls this."""
        try:
            self.settle()
        finally:
            with suppress(Exception):  # another thread may be reading the connection
                self._close_source()
