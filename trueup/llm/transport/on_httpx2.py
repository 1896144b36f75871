"""The metered transport's classes for httpx2."""

from typing import Any, ClassVar

import httpx2

from trueup.llm.transport.bodies import TappedBody
from trueup.llm.transport.transport import MeteredTransport


class Body(TappedBody, httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A streamed answer's body."""


class Transport(MeteredTransport, httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """A transport for clients of httpx2."""

    http: ClassVar[Any] = httpx2
    body: ClassVar[type[TappedBody]] = Body
