"""What Prometheus is told: requests and their times, the gate's decisions, and how the books stand."""

from collections.abc import Iterator
from typing import Any, cast

from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from trueup.database.retry import retrying
from trueup.errors import NotInstalledError, ServiceUnavailableError
from trueup.monitoring.status import read_gauges

ALLOWED = "allowed"
NO_ROUTE = "none"


class Metrics:
    """The figures of one application in this process, and of the database it looks at."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "trueup_http_requests", "Requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "trueup_http_request_seconds",
            "Time to answer.",
            ("route",),
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self._registry,
        )
        self.in_flight = Gauge("trueup_http_requests_in_flight", "Requests being answered.", registry=self._registry)
        self._decisions = Counter(
            "trueup_decisions", "Checks of the gate in this process.", ("outcome",), registry=self._registry
        )
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_Books())

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request. `route` is the path's pattern: a path itself would make a series of each id."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_decision(self, outcome: str = ALLOWED) -> None:
        """Count a decision of the gate: `ALLOWED` or a reason code."""
        self._decisions.labels(outcome).inc()

    def exposition(self) -> bytes:
        """Return it all in Prometheus' text format. Reads the database."""
        return generate_latest(self._registry)


class _Books(Collector):
    """How the books stand, read from the database when asked. Without an answer only `trueup_database_up 0`."""

    def collect(self) -> Iterator[Metric]:
        try:
            gauges = retrying(read_gauges)
        except (ServiceUnavailableError, NotInstalledError):
            yield GaugeMetricFamily("trueup_database_up", "Whether the database answers.", value=0)
            return
        yield GaugeMetricFamily("trueup_database_up", "Whether the database answers.", value=1)
        for name, (value, meaning) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(f"trueup_{name}", meaning, value=value)

    def describe(self) -> list[Any]:
        """Say nothing: else registering would read the database."""
        return []


def of(request: Request) -> Metrics:
    """Return the metrics of the request's application."""
    return cast(Metrics, request.app.state.metrics)
