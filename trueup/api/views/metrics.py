"""Metrics for Prometheus: requests and their durations, gate decisions, holds and drift."""

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
    """The metrics of one application in this process, and of its database."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "trueup_http_requests", "Requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "trueup_http_request_seconds",
            "Seconds until the answer.",
            ("route",),
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self._registry,
        )
        self.in_flight = Gauge("trueup_http_requests_in_flight", "Requests being answered.", registry=self._registry)
        self._decisions = Counter(
            "trueup_decisions", "Gate checks in this process.", ("outcome",), registry=self._registry
        )
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_Books())

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request. `route`: the path's pattern, because a path would make a series for each id."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_decision(self, outcome: str = ALLOWED) -> None:
        """Count a decision of the gate. `outcome`: `ALLOWED` or a denial's reason code."""
        self._decisions.labels(outcome).inc()

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format. It reads the database."""
        return generate_latest(self._registry)


class _Books(Collector):
    """Gauges read from the database at each scrape. Without a database there is only `trueup_database_up 0`."""

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
        """Return no descriptions: otherwise the registration would read the database."""
        return []


def of(request: Request) -> Metrics:
    """Return the metrics of the request's application."""
    return cast(Metrics, request.app.state.metrics)
