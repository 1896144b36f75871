"""OpenTelemetry as a host sets it up for its worker: `-I tests.support.traced_worker`.

Each process of the pool has an SDK of its own, and each task a span, as opentelemetry-instrumentation-celery makes it.
The spans are appended to the file that `SPANS_FILE` names, a line of JSON each.
"""

import os
from contextlib import AbstractContextManager
from typing import Any

from celery.signals import task_postrun, task_prerun, worker_process_init
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

SPANS_FILE = "SPANS_FILE"

_running: list[AbstractContextManager[object]] = []


@worker_process_init.connect
def set_up(**_: Any) -> None:
    out = open(os.environ[SPANS_FILE], "a", buffering=1)  # noqa: SIM115 - until the process ends
    exporter = ConsoleSpanExporter(out=out, formatter=_line)
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


@task_prerun.connect
def begin(task: Any, **_: Any) -> None:
    span = trace.get_tracer("host").start_as_current_span(f"run/{task.name}")
    span.__enter__()
    _running.append(span)


@task_postrun.connect
def end(**_: Any) -> None:
    _running.pop().__exit__(None, None, None)


def _line(span: ReadableSpan) -> str:
    return span.to_json(indent=None) + "\n"
