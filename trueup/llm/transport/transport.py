"""The transport under the makers' SDKs. It is synchronous and asynchronous at once, as some frameworks need it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar

from trueup.errors import TrueupError
from trueup.llm.calls import Bill
from trueup.llm.formats.reading import count_of, object_of, parsed
from trueup.llm.formats.wire_format import Count
from trueup.llm.outcomes import never_sent
from trueup.llm.transport.bodies import TappedBody, closer_of, recorded, undone_if_cancelled
from trueup.llm.transport.pools import Pools
from trueup.llm.transport.purchases import MEDIA_HEADER, REPLAYED_HEADER, Meter, Planned, Purchase, Receipt, stored_body
from trueup.llm.transport.refusals import passing_through_sdks
from trueup.llm.transport.taps import LongAnswer, Tap
from trueup.settings.settings import get_settings

# A longer answer is passed on as it comes, and its usage is looked for at its end.
MAX_READ_BYTES = 64 * 2**20
# The extension of a response that gives its receipt: a function, because a stream has a bill only at its end.
RECEIPT = "trueup_receipt"
# Headers of the caller's request that are not sent on: the body may get another length.
_REPLACED = (MEDIA_HEADER, "content-length", "transfer-encoding")
# A stream is stored compressed. So much of it is kept until its end, as a multiple of the size that may be stored.
_SHRINKING = 10


class MeteredTransport:
    """Sends requests. Requests that cost tokens are calls of the running hold.

    Each attempt of an SDK is one call. The classes of each HTTP library's transports inherit from this one.
    """

    http: ClassVar[Any]
    """The HTTP library, a module."""
    body: ClassVar[type[TappedBody]]

    def __init__(self, meter: Meter, pools: Pools) -> None:
        self._meter = meter
        self._pools = pools

    def handle_request(self, request: Any) -> Any:
        inner = self._pools.sync_for(request.url)
        with passing_through_sdks():
            content = request.read()
            planned = self._plan(request, content)
            if planned is None:
                return inner.handle_request(request)
            with planned.running.calling():
                purchase = planned.begin()
                if purchase.call.paid is not None:
                    return self._replayed(purchase.call.paid)
                return _with_receipt(self._buy(inner, request, purchase, content), purchase)

    async def handle_async_request(self, request: Any) -> Any:
        inner = self._pools.async_for(request.url)
        with passing_through_sdks():
            content = await request.aread()
            planned = self._plan(request, content)
            if planned is None:
                return await inner.handle_async_request(request)
            with planned.running.calling():
                purchase = await undone_if_cancelled(planned.running, planned.begin, _not_sent)
                if purchase.call.paid is not None:
                    return self._replayed(purchase.call.paid)
                return _with_receipt(await self._abuy(inner, request, purchase, content), purchase)

    def close(self) -> None:
        self._pools.close()

    async def aclose(self) -> None:
        await self._pools.aclose()

    def _plan(self, request: Any, content: bytes) -> Planned | None:
        return self._meter.plan(
            request.method, request.url, request.headers, content, lambda count: self._ask(request, count)
        )

    def _ask(self, request: Any, count: Count) -> int | None:
        """Ask the provider's own counter, which is free, for the tokens of a prompt. None: it gave no count."""
        path = request.url.path
        path = path.rpartition(":")[0] + count.ending if count.ending.startswith(":") else path + count.ending
        url = request.url.copy_with(path=path).copy_remove_param("alt")
        content = json.dumps(count.body).encode()
        question = self.http.Request(
            "POST", url, headers=self._headers_of(request), content=content, extensions=request.extensions
        )
        try:
            response = self._pools.sync_for(url).handle_request(question)
            answer = object_of(parsed(response.read()))
            response.close()
        except (self.http.RequestError, NotImplementedError, AttributeError):  # the caller's transport is asynchronous
            return None
        return count_of(answer.get(count.answer)) if response.status_code == 200 else None

    def _headers_of(self, request: Any) -> Any:
        """Return the request's headers for a request with another body."""
        headers = self.http.Headers(request.headers)
        for name in _REPLACED:
            if name in headers:
                del headers[name]
        return headers

    def _buy(self, inner: Any, request: Any, purchase: Purchase, content: bytes) -> Any:
        try:
            while True:
                response = inner.handle_request(self._outgoing(request, purchase, content))
                if _is_event_stream(purchase, response):
                    return self._tapped(response, purchase, response.stream.close)
                parts = iter(response.stream)
                raw, is_whole = _read(parts)
                if not is_whole:
                    tap = LongAnswer(purchase, _encoding(response), response.stream.close)
                    return self._like(response, self.body(_Continued(raw, parts, response.stream), tap))
                response.stream.close()
                if not purchase.refuses_usage(response.status_code, raw):
                    break
        except Exception as error:
            self._fail(purchase, error)
            raise
        self._answer(purchase, response, raw)
        return self._like(response, self.http.ByteStream(raw))

    async def _abuy(self, inner: Any, request: Any, purchase: Purchase, content: bytes) -> Any:
        running = purchase.call.running
        try:
            while True:
                response = await inner.handle_async_request(self._outgoing(request, purchase, content))
                if _is_event_stream(purchase, response):
                    return self._tapped(response, purchase, closer_of(response.stream))
                parts = aiter(response.stream)
                raw, is_whole = await _aread(parts)
                if not is_whole:
                    tap = LongAnswer(purchase, _encoding(response), closer_of(response.stream))
                    return self._like(response, self.body(_Continued(raw, parts, response.stream), tap))
                await response.stream.aclose()
                if not purchase.refuses_usage(response.status_code, raw):
                    break
        except Exception as error:
            broken = error  # the name ends with the block
            await recorded(running, lambda: self._fail(purchase, broken))
            raise
        except asyncio.CancelledError:  # the provider may work on, and bill it
            running.in_flight.start(lambda: purchase.fail(unknown=True, error_type="CancelledError"))
            raise
        await recorded(running, lambda: self._answer(purchase, response, raw))
        return self._like(response, self.http.ByteStream(raw))

    def _outgoing(self, request: Any, purchase: Purchase, content: bytes) -> Any:
        """Return the request with its answer capped, and a stream in a form that can be read on its way."""
        body = purchase.content(content, request.headers)
        headers = self._headers_of(request)
        if purchase.is_stream:
            headers["accept-encoding"] = "identity"
        return self.http.Request(
            request.method, request.url, headers=headers, content=body, extensions=request.extensions
        )

    def _answer(self, purchase: Purchase, response: Any, raw: bytes) -> None:
        decoded = raw
        if _encoding(response):
            try:
                decoded = self.http.Response(response.status_code, headers=response.headers, content=raw).content
            except self.http.DecodingError:
                decoded = b""
        purchase.answer(response.status_code, response.headers.get("content-type", ""), decoded)

    def _tapped(self, response: Any, purchase: Purchase, close_source: Callable[[], object]) -> Any:
        content_type = response.headers.get("content-type", "")
        settings = get_settings()
        keep_bytes = _SHRINKING * settings.stored_answer_max_bytes if settings.store_answers else 0
        tap = Tap(purchase, content_type, _encoding(response), close_source, keep_bytes)
        answer = self._like(response, self.body(response.stream, tap))
        if tap.rewrites:
            for name in ("content-encoding", "content-length"):
                answer.headers.pop(name, None)
        return answer

    def _like(self, response: Any, stream: Any) -> Any:
        """Return the response with another body: itself, unless the caller's transport has read it already."""
        if not response.is_closed:
            response.stream = stream
            return response
        return self.http.Response(
            response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
        )

    def _replayed(self, paid: dict[str, Any]) -> Any:
        headers = {"content-type": paid["content_type"], REPLAYED_HEADER: "true"}
        receipt = Receipt(bill=Bill.from_json(paid["bill"]))
        return self.http.Response(
            paid["status"],
            headers=headers,
            stream=self.http.ByteStream(stored_body(paid)),
            extensions={RECEIPT: lambda: receipt},
        )

    def _fail(self, purchase: Purchase, error: Exception) -> None:
        """Record that the call ended with an error instead of an answer."""
        is_unsent = isinstance(error, (*never_sent(self.http), TrueupError))
        purchase.fail(unknown=not is_unsent, error_type=type(error).__name__)


class _Continued:
    """A body whose beginning was read: that, and the rest as it comes."""

    def __init__(self, read: bytes, rest: Any, stream: Any) -> None:
        self._read = read
        self._rest = rest
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield self._read
        self._read = b""
        yield from self._rest

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._read
        self._read = b""
        async for part in self._rest:
            yield part

    def close(self) -> None:
        self._stream.close()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _read(parts: Iterator[bytes]) -> tuple[bytes, bool]:
    """Return the body, and whether it is whole: at most about `MAX_READ_BYTES` are read."""
    read, size = [], 0
    for part in parts:
        read.append(part)
        size += len(part)
        if size > MAX_READ_BYTES:
            return b"".join(read), False
    return b"".join(read), True


async def _aread(parts: AsyncIterator[bytes]) -> tuple[bytes, bool]:
    """Do as `_read`."""
    read, size = [], 0
    async for part in parts:
        read.append(part)
        size += len(part)
        if size > MAX_READ_BYTES:
            return b"".join(read), False
    return b"".join(read), True


def _with_receipt(response: Any, purchase: Purchase) -> Any:
    response.extensions = {**response.extensions, RECEIPT: purchase.receipt}
    return response


def _is_event_stream(purchase: Purchase, response: Any) -> bool:
    """Return whether the answer is a stream of events. Some servers give it another type; a whole answer is JSON."""
    if not purchase.is_stream or response.status_code >= 300:
        return False
    return "json" not in response.headers.get("content-type", "").lower()


def _encoding(response: Any) -> str:
    return str(response.headers.get("content-encoding", "")).strip().lower()


def _not_sent(purchase: Purchase) -> None:
    """Undo an admission whose caller is gone."""
    if purchase.call.paid is None:
        purchase.fail(unknown=False)
    else:
        purchase.call.running.hold.calls.give_back(purchase.call.fingerprint, purchase.call.number)
