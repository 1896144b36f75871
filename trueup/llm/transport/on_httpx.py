"""The metered transport's classes for httpx."""

from typing import Any, ClassVar

import httpx

from trueup.llm.transport.bodies import TappedBody
from trueup.llm.transport.transport import MeteredTransport


class Body(TappedBody, httpx.SyncByteStream, httpx.AsyncByteStream):
    """A streamed answer's body."""


class Transport(MeteredTransport, httpx.BaseTransport, httpx.AsyncBaseTransport):
    """A transport for clients of httpx."""

    http: ClassVar[Any] = httpx
    body: ClassVar[type[TappedBody]] = Body
