"""No task that can spend bypasses the gate. The tests check every task; docs/features.md names a test for each."""

import ast
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, shared_task
from celery.app.task import Task
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.wire import Wire, wire_server
from tests.support.worker import own_application
from trueup.errors import InvalidInputError, ProviderError, SettingsError, TokensDenied
from trueup.features import enhancement, messages, questions
from trueup.features.instagram import direct_message
from trueup.features.products import extractor
from trueup.gate.holds import list_holds
from trueup.llm.providers.offline import offline_provider
from trueup.settings.settings import get_settings
from trueup.tasks import MeteredTask
from trueup.tasks.metered import _model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CHAT = json.loads((EXAMPLES / "chat.json").read_text())

# Arguments for each metered task that make it call the model.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "trueup.generate_qa": {"text": (EXAMPLES / "help_en.txt").read_text(), "max_pairs": 2},
    "trueup.extract_products": {"url": "https://shop.example/", "text": "Mug\n5 EUR"},
    "trueup.send_instagram_dm": json.loads((EXAMPLES / "comment_product.json").read_text()),
    "trueup.reply_to_message": CHAT,
    "trueup.ask_question": {"question": "Are returns free?", "context": ["Returns are free."]},
    "trueup.generate_prompt": {"prompt": (EXAMPLES / "prompt_draft.txt").read_text(), "business": CHAT["business"]},
}
ESTIMATES = {
    "trueup.extract_products": extractor.ESTIMATED_TOKENS,
    "trueup.send_instagram_dm": direct_message.ESTIMATED_TOKENS,
    "trueup.reply_to_message": messages.ESTIMATED_TOKENS,
    "trueup.ask_question": questions.ESTIMATED_TOKENS,
    "trueup.generate_prompt": enhancement.ESTIMATED_TOKENS,
}


SPENDING = ("trueup.features.", "trueup.llm.", "openai.")


@pytest.fixture
def app(database: str) -> Celery:
    return own_application()


@pytest.fixture
def wire(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """A provider over HTTP that records its requests and never answers."""
    with wire_server() as wire:
        monkeypatch.setenv("TRUEUP_MODEL_PROVIDER", "openai")
        monkeypatch.setenv("TRUEUP_OPENAI_API_KEY", "sk-test")
        monkeypatch.setenv("TRUEUP_OPENAI_BASE_URL", wire.url)
        monkeypatch.setenv("TRUEUP_INSTAGRAM_ACCESS_TOKEN", "token")
        get_settings.cache_clear()
        _model.cache_clear()
        yield wire
    _model.cache_clear()


@shared_task(name="test.ungated")
def ungated_task() -> str:
    """A forbidden kind of task: it calls a provider without a hold."""
    return offline_provider().complete([], max_completion_tokens=1).text


def imported(source: str) -> Iterator[str]:
    """Yield the full name of everything that a module imports, at its top or later."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def can_spend(task: Task) -> bool:
    """Whether a task's module imports a model client, ours or a provider's own."""
    module = inspect.getmodule(inspect.unwrap(task.run))
    assert module is not None
    return any(f"{name}.".startswith(SPENDING) for name in imported(inspect.getsource(module)))


def not_gated(tasks: Iterable[Task]) -> list[str]:
    return [task.name for task in tasks if can_spend(task) and not isinstance(task, MeteredTask)]


def own_tasks(app: Celery) -> list[Task]:
    return [task for name, task in app.tasks.items() if name.startswith("trueup.")]


def test_every_task_that_can_spend_is_metered(app: Celery) -> None:
    assert not_gated(own_tasks(app)) == []
    assert {task.name for task in own_tasks(app) if isinstance(task, MeteredTask)} == set(ARGUMENTS)


def test_the_check_finds_a_task_without_a_gate(app: Celery) -> None:
    assert not_gated([*own_tasks(app), app.tasks["test.ungated"]]) == ["test.ungated"]


def test_only_the_metered_task_imports_a_provider() -> None:
    """Every other module calls a `Model`, which spends from a hold or refuses."""
    sources = [
        path
        for package in ("tasks", "worker", "cli", "trueup/api", "trueup/stack")
        for path in ROOT.glob(f"{package}/**/*.py")
    ]
    holders = {
        str(path.relative_to(ROOT))
        for path in sources
        for name in imported(path.read_text())
        if name.startswith(
            ("trueup.llm.providers.", "trueup.llm.offline.", "trueup.llm.metering.MeteredModel", "openai")
        )
        and name != "trueup.llm.providers.counter_from_settings"
    }
    assert holders == {"tasks/metered.py"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_user_without_tokens_is_denied_before_any_work(
    name: str, app: Celery, wire: Wire, host: Host, connection: Connection
) -> None:
    user = host.subscriber(0)
    with pytest.raises(TokensDenied) as denied:
        app.tasks[name].apply(kwargs={"user_id": user, **ARGUMENTS[name]}).get()
    assert denied.value.error_code == "no_tokens_remaining"
    assert wire.requests == []
    assert list_holds(connection, user_id=user, every_status=True) == []
    assert host.used(user) == 0


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("missing", ["TRUEUP_MODEL_PROVIDER", "TRUEUP_OPENAI_API_KEY"])
def test_a_task_without_a_configured_provider_fails_before_the_gate(
    name: str,
    missing: str,
    app: Celery,
    wire: Wire,
    host: Host,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(missing)
    if missing == "TRUEUP_OPENAI_API_KEY":
        monkeypatch.delenv("TRUEUP_OPENAI_BASE_URL")  # a server other than OpenAI's may need no key
    get_settings.cache_clear()
    users = [host.subscriber(100_000), host.subscriber(0)]
    for user in users:
        with pytest.raises(SettingsError, match=missing):
            app.tasks[name].apply(kwargs={"user_id": user, **ARGUMENTS[name]}).get()
        with pytest.raises(SettingsError, match=missing):
            app.tasks[name](user_id=user, **ARGUMENTS[name])
        assert list_holds(connection, user_id=user, every_status=True) == []
    assert host.value("SELECT count(*) FROM trueup.balance") == 0
    assert wire.requests == []


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_user_with_tokens_reaches_the_provider_through_a_hold(
    name: str, app: Celery, wire: Wire, host: Host, connection: Connection
) -> None:
    user = host.subscriber(100_000)
    with pytest.raises(ProviderError):
        app.tasks[name].apply(kwargs={"user_id": user, **ARGUMENTS[name]}).get()
    [request] = wire.requests
    [hold] = list_holds(connection, user_id=user, every_status=True)
    assert request["max_tokens"] <= hold.tokens_reserved
    assert (hold.tokens_reserved, hold.status) == (ESTIMATES.get(name, hold.tokens_reserved), "released")


@pytest.mark.parametrize("name", ESTIMATES)
def test_one_token_less_than_the_estimate_is_denied(name: str, app: Celery, wire: Wire, host: Host) -> None:
    user = host.subscriber(ESTIMATES[name] - 1)
    with pytest.raises(TokensDenied) as denied:
        app.tasks[name].apply(kwargs={"user_id": user, **ARGUMENTS[name]}).get()
    assert denied.value.error_code == "insufficient_tokens"
    assert wire.requests == []


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("trueup.reply_to_message", {"message": ""}, "message has 0"),
        ("trueup.reply_to_message", {"message": "Hi", "history": [{"sender": "system", "text": "x"}]}, "history.0"),
        ("trueup.reply_to_message", {"message": "Hi", "history": "x"}, "history: "),
        ("trueup.ask_question", {"question": "x" * 4001}, "question has 4001"),
        ("trueup.ask_question", {"question": "When?", "context": [1]}, r"context\.0"),
        ("trueup.generate_prompt", {"prompt": ""}, "prompt has 0"),
        ("trueup.generate_prompt", {"prompt": "Be nice.", "business": {"x": 1}}, r"business\.x"),
    ],
)
def test_wrong_input_is_refused_before_any_token_is_held(
    name: str, arguments: dict[str, Any], fault: str, app: Celery, host: Host, connection: Connection
) -> None:
    user = host.subscriber()
    with pytest.raises(InvalidInputError, match=fault):
        app.tasks[name].apply(kwargs={"user_id": user, **arguments}).get()
    assert list_holds(connection, user_id=user, every_status=True) == []


@pytest.mark.parametrize(
    ("name", "part"),
    [("trueup.reply_to_message", "reply"), ("trueup.ask_question", "answer"), ("trueup.generate_prompt", "prompt")],
)
def test_a_task_charges_its_usage_and_releases_the_rest(
    name: str, part: str, app: Celery, host: Host, connection: Connection
) -> None:
    _model.cache_clear()
    user = host.subscriber()
    result = app.tasks[name].apply(kwargs={"user_id": user, **ARGUMENTS[name]}).get()
    assert result[part]
    [hold] = list_holds(connection, user_id=user, every_status=True)
    assert hold.status == "settled"
    section = host.value("SELECT section FROM ai_usage_log WHERE user_id = :user", user=user)
    assert section == app.tasks[name].section
    assert 0 < hold.tokens_charged == host.used(user) < hold.tokens_reserved
    assert host.counter(user) == 10_000 - hold.tokens_charged


FEATURES = (ROOT / "docs" / "features.md").read_text()
ROWS = re.findall(
    r"^\| (?P<feature>[^|]+) \|(?P<ways>[^|]+)\| (?P<estimate>[^|]+) \| `(?P<section>\w+)` \| `(?P<test>[^`]+)` \|$",
    FEATURES,
    re.MULTILINE,
)


def test_the_table_of_features_lists_every_metered_task_with_its_true_values(app: Celery) -> None:
    named = {}
    for feature, ways, estimate, section, _ in ROWS:
        for name in re.findall(r"`(trueup\.\w+)`", ways):
            named[name] = (feature.strip(), section, estimate)
    assert set(named) == set(ARGUMENTS)
    for name, (feature, section, estimate) in named.items():
        task = app.tasks[name]
        assert (feature, section) == (task.feature_name, task.section)
        assert estimate.startswith(f"{ESTIMATES[name]:,}" if name in ESTIMATES else "variable")


def test_the_table_of_features_names_existing_tests() -> None:
    for _, ways, _, _, test in ROWS:
        file, _, name = test.partition("::")
        function, _, case = name.partition("[")
        defined = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")]
        assert function in defined, test
        assert not case or case.rstrip("]") in ways, test
