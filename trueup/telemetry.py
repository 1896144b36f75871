"""Spans and metrics for OpenTelemetry. Without the extra [otel], or a provider of the host's, there are no spans.

The host's own OpenTelemetry SDK decides whether and where they are exported.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from opentelemetry import metrics, trace

Value = str | int | float | bool
_SCOPE = "trueup"


def _tracer() -> "trace.Tracer | None":
    """Return the tracer of the host's provider. None: there is no provider yet, so a span would go nowhere."""
    api = _trace_api()
    if api is None:
        return None
    provider = api.get_tracer_provider()
    return None if isinstance(provider, api.ProxyTracerProvider) else _tracer_of(provider)


@cache
def _trace_api() -> ModuleType | None:
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace


@cache
def _tracer_of(provider: "trace.TracerProvider") -> "trace.Tracer":
    return provider.get_tracer(_SCOPE)


@cache
def _meter() -> "metrics.Meter | None":
    try:
        from opentelemetry import metrics
    except ImportError:
        return None
    return metrics.get_meter(_SCOPE)


class Span:
    """A span that has begun, or nothing. It may end in another thread."""

    def __init__(self, name: str, attributes: Mapping[str, Value], *, is_client: bool = False) -> None:
        """`is_client`: the span is a request to another service."""
        tracer = _tracer()
        self._span: trace.Span | None = None
        if tracer is not None:
            from opentelemetry.trace import SpanKind

            kind = SpanKind.CLIENT if is_client else SpanKind.INTERNAL
            self._span = tracer.start_span(name, kind=kind, attributes=attributes)

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes."""
        if self._span is not None:
            self._span.set_attributes(attributes)

    def current(self) -> AbstractContextManager[object]:
        """Return a block in which new spans are this span's children. It does not end the span."""
        if self._span is None:
            return nullcontext()
        from opentelemetry import trace

        return trace.use_span(self._span, end_on_exit=False, record_exception=False, set_status_on_exception=False)

    def end(self, error_type: str | None = None) -> None:
        """End the span; a second call does nothing. `error_type`: the name of what failed; None: nothing did."""
        begun, self._span = self._span, None
        if begun is None:
            return
        if error_type is not None:
            from opentelemetry.trace import StatusCode

            begun.set_attribute("error.type", error_type)
            begun.set_status(StatusCode.ERROR)
        begun.end()


class span(Span):  # noqa: N801 - used as a function: `with span(name, attributes) as traced`
    """A span of a block, which it ends. An error of the block is named in it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(None if kind is None else kind.__name__)


@cache
def _histogram(name: str, unit: str, description: str, bounds: tuple[float, ...]) -> "metrics.Histogram | None":
    meter = _meter()
    if meter is None:
        return None
    return meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=bounds)


class Histogram:
    """A metric of values. `unit`: in UCUM, such as "s". `bounds`: of its buckets."""

    def __init__(self, name: str, unit: str, description: str, bounds: Sequence[float]) -> None:
        self._is = (name, unit, description, tuple(bounds))

    def record(self, value: float, attributes: Mapping[str, Value]) -> None:
        """Record a value."""
        histogram = _histogram(*self._is)
        if histogram is not None:
            histogram.record(value, attributes)
