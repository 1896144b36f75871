"""Spans go to the provider that the host sets, whenever it sets it."""

import subprocess
import sys

SCRIPT = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from trueup.telemetry import span

with span("before", {}) as begun:
    begun.set({"x": 1})
    with begun.current():
        assert not trace.get_current_span().is_recording()
exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
for name in ("first", "second"):
    with span(name, {}) as begun, begun.current():
        assert trace.get_current_span().is_recording()
print([(one.name, one.instrumentation_scope.name) for one in exporter.get_finished_spans()])
"""


def test_a_provider_that_the_host_sets_after_the_first_span_gets_the_later_ones() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[('first', 'trueup'), ('second', 'trueup')]"
