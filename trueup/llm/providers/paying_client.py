"""The HTTP client of our providers: metered, with limits on answers, and it repeats nothing that may be billed."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx2

from trueup.llm.outcomes import may_be_billed, never_sent
from trueup.llm.transport.on_httpx2 import Transport
from trueup.llm.transport.pools import Pools
from trueup.llm.transport.purchases import Meter, Receipt
from trueup.llm.transport.transport import RECEIPT

# No model's answer is so long: 100,000 tokens, each in an event of its own, take about 30 MB.
MAX_ANSWER_BYTES = 64 * 2**20
# What each event of a stream begins with; comments that keep a connection alive do not.
_EVENT = b"data:"
# The time of an answer is counted in so many steps. A step in which this process was stopped counts as one, however
# long it took.
_STEPS = 20


class PayingClient(httpx2.Client):
    """An HTTP client whose requests are calls of the running hold, and that stops the SDK from repeating them.

    An SDK retries after every error of its HTTP client, but passes an error of its own root class on. It also retries
    after a 5xx, unless the answer's headers forbid it. A request that is served twice would be billed twice.

    `root`: the root class of the SDK's errors; None: it does not retry. `answer_seconds`: the time for the wait for an
    answer's head, for the rest of the answer, and for each event of a stream. `inner`: takes the requests instead of a
    server.

    It also decodes every body as UTF-8, the encoding of JSON. A server may name a charset that Python does not know as
    a text encoding; reading the paid answer would then fail.
    """

    def __init__(
        self, *, root: type[Exception] | None, answer_seconds: float, inner: httpx2.BaseTransport | None = None
    ) -> None:
        pools = _LimitedPools(answer_seconds, inner)
        super().__init__(transport=Transport(Meter(), pools), follow_redirects=True, timeout=answer_seconds)
        self._root = root
        self._latest = threading.local()

    @property
    def latest_response(self) -> httpx2.Response:
        """The response that this thread received last."""
        response: httpx2.Response = self._latest.response
        return response

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        try:
            response = super().send(request, stream=True, **options)
            if not stream:
                response.read()
        except httpx2.RequestError as error:
            if isinstance(error, never_sent(httpx2)) or self._root is None:
                raise
            raise self._root(str(error)) from error
        response.encoding = "utf-8"
        if may_be_billed(response.status_code):
            response.headers["x-should-retry"] = "false"
        self._latest.response = response
        return response


def receipt_of(response: httpx2.Response) -> Receipt:
    """Return the state of an answer now."""
    receipt: Receipt | None = response.extensions.get(RECEIPT, lambda: None)()
    return receipt or Receipt(bill=None, is_complete=False)  # after a redirect that became a GET


class _LimitedPools(Pools):
    """Connections whose answers have limits of time and size."""

    def __init__(self, answer_seconds: float, inner: httpx2.BaseTransport | None) -> None:
        super().__init__(httpx2, inner, {}, trust_env=True)
        self._answer_seconds = answer_seconds

    def sync_for(self, url: Any) -> Any:
        found = super().sync_for(url)
        return found if self._inner is not None else _LimitedTransport(found, self._answer_seconds)


class _LimitedTransport(httpx2.BaseTransport):
    def __init__(self, inner: httpx2.BaseTransport, answer_seconds: float) -> None:
        self._inner = inner
        self._answer_seconds = answer_seconds

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self._inner.handle_request(request)
        response.stream = _LimitedStream(response, request, self._answer_seconds)
        return response


class _LimitedStream(httpx2.SyncByteStream):
    """The bytes of an answer, until its time is over or it is too long.

    HTTP clients limit each wait alone, so that a server which sends a byte now and then would be waited for without
    end. Time in which this process did not run does not count: the server has sent its answer meanwhile, and bills it.
    An answer of more than `MAX_ANSWER_BYTES` is broken off. `seconds`: the time for the answer, or for each event of a
    stream.
    """

    def __init__(self, response: httpx2.Response, request: httpx2.Request, seconds: float) -> None:
        self._stream = response.stream
        self._request = request
        self._seconds = seconds
        self._of_events = "json" not in response.headers.get("content-type", "").lower()
        connection = response.extensions.get("network_stream")
        self._socket = connection.get_extra_info("socket") if connection is not None else None
        # Each of these is set by one thread alone: the steps and the end by the watch, the others by the reader.
        self._steps = 0
        self._is_over = False
        self._first_step = 0
        self._is_paused = False
        self._ended = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        threading.Thread(target=self._watch, daemon=True).start()
        size = 0
        try:
            for part in self._stream:  # type: ignore[union-attr]
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    what = f"the answer is longer than {MAX_ANSWER_BYTES:,} bytes"
                    raise httpx2.ReadError(what, request=self._request)
                self._check_time(None)
                if not self._of_events:
                    yield part
                    continue
                # The time that the caller takes for a part is not the server's.
                self._is_paused = True
                if _EVENT in part:
                    self._first_step = self._steps
                yield part
                self._is_paused = False
        except httpx2.RequestError as error:
            self._check_time(error)
            raise
        finally:
            self._ended.set()

    def close(self) -> None:
        self._stream.close()  # type: ignore[union-attr]

    def _check_time(self, cause: Exception | None) -> None:
        if self._is_over:
            raise httpx2.ReadTimeout("the answer was not complete in time", request=self._request) from cause

    def _watch(self) -> None:
        """Shut the socket down when the time is over: that ends a read that waits."""
        while self._steps - self._first_step <= _STEPS:
            if self._ended.wait(self._seconds / _STEPS):
                return
            if not self._is_paused:
                self._steps += 1
        self._is_over = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
