"""OpenTelemetry: the spans of gate, call and charge, and the metrics by the conventions for generative AI."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.makers import Maker, maker_server
from tests.support.work import hold_tokens
from tests.test_extras import environment
from trueup import http_client
from trueup.billing.token_hold import ai_tokens
from trueup.errors import HoldBusyError, HoldExhaustedError, TaskIdReusedError, TokensDenied
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message
from trueup.llm.providers.offline import offline_provider
from trueup.llm.running import spending_from
from trueup.llm.tokens import OFFLINE_MODEL
from trueup.llm.traced_calls import Operation
from trueup.settings.settings import get_settings

QUESTION = "a question"


@dataclass(frozen=True)
class Exported:
    """What the host's SDK has exported."""

    spans_of_all: InMemorySpanExporter
    reader: InMemoryMetricReader

    def spans(self) -> list[ReadableSpan]:
        return list(self.spans_of_all.get_finished_spans())

    def names(self) -> list[str]:
        return [span.name for span in self.spans()]

    def only(self, name: str) -> ReadableSpan:
        [found] = [span for span in self.spans() if span.name == name]
        return found

    def points(self, name: str) -> list[tuple[Mapping[str, Any], Any]]:
        """Return the attributes and the point of each series of a metric."""
        data = self.reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        return [
            (point.attributes or {}, point)
            for scope in scopes
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture(scope="module")
def host_sdk() -> Exported:
    """The SDK of a host. A process can set it once."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))
    return Exported(exporter, reader)


@pytest.fixture
def exported(host_sdk: Exported) -> Exported:
    host_sdk.spans_of_all.clear()
    return host_sdk


@pytest.fixture
def maker() -> Iterator[Maker]:
    with maker_server() as maker:
        yield maker


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(100_000)


def test_a_call_of_an_sdk_is_a_span_between_the_gate_and_the_charge(
    exported: Exported, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.cached = 4
    with trace.get_tracer("host").start_as_current_span("request"):
        hold = hold_tokens(connection, user, 500, task="traced")
        with spending_from(hold):
            sdk = anthropic.Anthropic(base_url=maker.url, api_key="test", http_client=http_client())
            asked: Any = [{"role": "user", "content": QUESTION}]
            sdk.messages.create(model="claude-traced", max_tokens=100, messages=asked)
    request, call = exported.only("request"), exported.only("chat claude-traced")
    gate, charge = exported.only("trueup.gate"), exported.only("trueup.charge")
    sdk_span = exported.only("anthropic.messages.create")  # the SDK makes one too
    assert (gate.parent, sdk_span.parent) == (request.context, request.context)
    assert (call.parent, charge.parent) == (sdk_span.context, call.context)
    assert (call.kind, call.status.status_code) == (SpanKind.CLIENT, StatusCode.UNSET)
    row = host.execute("SELECT * FROM ai_usage_log").mappings().one()
    assert dict(call.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "claude-traced",
        "gen_ai.response.model": row["model_name"],
        "gen_ai.usage.input_tokens": row["prompt_tokens"],
        "gen_ai.usage.output_tokens": row["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.cache_write.input_tokens": 2,
        "gen_ai.usage.reasoning.output_tokens": 0,
        "trueup.task_id": "traced",
        "trueup.feature": hold.feature_name,
    }
    assert (gate.attributes or {})["trueup.gate.outcome"] == "admitted"
    assert (gate.attributes or {})["trueup.tokens.estimated"] == 500
    assert (charge.attributes or {})["trueup.tokens.charged"] == row["total_tokens"]


def test_the_tokens_and_the_duration_of_a_call_are_metrics_and_a_replay_is_in_none(
    exported: Exported, host: Host, connection: Connection, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MeteredModel(offline_provider)
    for retries in (0, 1):
        with spending_from(hold_tokens(connection, user, 1_000, task="metrics", retries=retries)):
            model.complete([Message(role="user", content=QUESTION)], max_completion_tokens=20)
    row = host.execute("SELECT * FROM ai_usage_log").mappings().one()
    name = "gen_ai.request.model"
    points = {
        attributes["gen_ai.token.type"]: point
        for attributes, point in exported.points("gen_ai.client.token.usage")
        if attributes[name] == OFFLINE_MODEL
    }
    assert {kind: (point.count, point.sum) for kind, point in points.items()} == {
        "input": (1, row["prompt_tokens"]),
        "output": (1, row["completion_tokens"]),
    }
    assert list(points["input"].explicit_bounds) == [4**power for power in range(14)]
    durations = [(a, p) for a, p in exported.points("gen_ai.client.operation.duration") if a[name] == OFFLINE_MODEL]
    [(attributes, point)] = durations
    assert (point.count, point.sum) == (1, row["response_time_ms"] / 1000)
    assert (attributes["gen_ai.operation.name"], attributes["gen_ai.provider.name"]) == ("chat", "offline")
    bought, replayed = [span for span in exported.spans() if span.name == f"chat {OFFLINE_MODEL}"]
    assert "trueup.replayed" not in (bought.attributes or {})
    assert (replayed.attributes or {})["trueup.replayed"] is True


def test_failed_and_refused_calls_are_errors_and_a_denial_is_an_outcome(
    exported: Exported, maker: Maker, host: Host, connection: Connection, user: int
) -> None:
    maker.faults = [429, "reset"]
    sdk = openai.OpenAI(base_url=f"{maker.url}/v1", api_key="test", http_client=http_client(), max_retries=0)
    with spending_from(hold_tokens(connection, user, 500)):
        with pytest.raises(openai.RateLimitError):
            sdk.embeddings.create(model="failing", input=[QUESTION])
        with pytest.raises(openai.APIConnectionError):
            sdk.embeddings.create(model="failing", input=[QUESTION])
        with pytest.raises(HoldExhaustedError):
            sdk.embeddings.create(model="failing", input=[QUESTION * 1_000])
    spans = [span for span in exported.spans() if span.name == "embeddings failing"]
    assert [span.status.status_code for span in spans] == [StatusCode.ERROR] * 3
    kinds = [(span.attributes or {})["error.type"] for span in spans]
    assert kinds == ["429", "ReadError", "HoldExhaustedError"]
    durations = exported.points("gen_ai.client.operation.duration")
    assert [p.count for a, p in durations if a["gen_ai.request.model"] == "failing"] == [1, 1]
    with pytest.raises(TokensDenied), ai_tokens(user, 200_000):
        pass
    denied = [span for span in exported.spans() if span.name == "trueup.gate"][-1]
    assert (denied.attributes or {})["trueup.gate.outcome"] == "insufficient_tokens"
    assert denied.status.status_code == StatusCode.UNSET


@pytest.mark.parametrize(("request_now", "error"), [("first", HoldBusyError), ("second", TaskIdReusedError)])
def test_a_gate_that_another_attempt_or_request_has_passed_is_in_use(
    exported: Exported, connection: Connection, user: int, request_now: str, error: type[Exception]
) -> None:
    hold_tokens(connection, user, 100, task="t", request="first", lease=60)
    with pytest.raises(error):
        hold_tokens(connection, user, 100, task="t", request=request_now)
    in_use = [span for span in exported.spans() if span.name == "trueup.gate"][-1]
    assert (in_use.attributes or {})["trueup.gate.outcome"] == "in_use"


@pytest.mark.parametrize(
    ("format_name", "host_name", "named"),
    [
        ("openai chat", "api.openai.com", ("chat", "openai")),
        ("openai responses", "acme.openai.azure.com", ("chat", "azure.ai.openai")),
        ("openai embeddings", "127.0.0.1", ("embeddings", "openai")),
        ("openai chat", "api.groq.com", ("chat", "groq")),
        ("openai chat", "notapi.groq.com.example", ("chat", "openai")),
        ("gemini generateContent", "generativelanguage.googleapis.com", ("generate_content", "gcp.gemini")),
        ("gemini embedContent", "us-central1-aiplatform.googleapis.com", ("embeddings", "gcp.vertex_ai")),
        ("anthropic messages", "api.anthropic.com", ("chat", "anthropic")),
        ("openai chat", "offline.invalid", ("chat", "offline")),
    ],
)
def test_operations_and_providers_have_the_conventions_names(
    format_name: str, host_name: str, named: tuple[str, str]
) -> None:
    operation = Operation.of_request(format_name, host_name, "m")
    assert (operation.name, operation.provider) == named


def test_a_host_without_the_extra_charges_as_ever(database: str, host: Host, user: int, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from trueup import ai_tokens\n"
        f"with ai_tokens({user}, 500) as hold:\n"
        "    hold.charge(prompt_tokens=20, completion_tokens=10, model_name='m')\n"
        "print([name for name, module in sys.modules.items() if name.startswith('opentelemetry.') and module])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), host.used(user)) == ("[]", 30)
    assert get_settings().database_url is not None
