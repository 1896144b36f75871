"""The manual's code that needs no framework runs as written, and its texts equal those of the code."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.documents import MANUAL, ROOT, SPECIFICATION, code_under, python_under_headings, run
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.worker import own_application
from trueup.errors import TokensDenied
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Completion, Message
from trueup.llm.providers import provider_from_settings
from trueup.settings.settings import PREFIX, Settings, get_settings

TEXT = MANUAL.read_text()
KEPT_PATHS = {"`billing/utils.py`", "`billing/decorators.py`"}


@pytest.fixture
def model(database: str) -> MeteredModel:
    return MeteredModel(lambda: provider_from_settings(get_settings()))


def test_trueups_model_client_spends_from_the_block(host: Host, model: MeteredModel) -> None:
    user = host.subscriber()
    names = run(MANUAL, "With trueup's own model client", user=user, model=model, text="Orders are sent in two days.")
    assert host.used(user) == names["answer"].total_tokens > 0
    assert_true(host)


def test_a_plain_task_holds_tokens_in_its_body(host: Host) -> None:
    class Provider:
        def complete(self, text: str, *, max_tokens: int) -> Completion:
            assert 0 < max_tokens < 1_500
            return Completion(
                text=text, prompt_tokens=90, completion_tokens=10, total_tokens=100, model_name="m", response_time_ms=1
            )

    own_application()
    summarize = run(MANUAL, "In a plain Celery task", provider=Provider())["summarize"]
    user, poor = host.subscriber(), host.subscriber(1_000)
    assert summarize.apply(kwargs={"user_id": user, "text": "Hello"}).get() == "Hello"
    assert (host.used(user), host.counter(user)) == (100, 10_000 - 100)
    denied = summarize.apply(kwargs={"user_id": poor, "text": "Hello"})
    assert isinstance(denied.result, TokensDenied)
    assert_true(host)


def test_usage_is_reported_both_ways(host: Host) -> None:
    class Provider:
        def complete(self, text: str) -> Completion:
            assert Message(role="user", content=text)
            return Completion(
                text="", prompt_tokens=90, completion_tokens=10, total_tokens=100, model_name="m", response_time_ms=1
            )

    user = host.subscriber()
    names: dict[str, Any] = run(
        MANUAL, "Reporting usage", user=user, request_id="request 1", text="Hello", provider=Provider()
    )
    assert names["usage"].recorded.recorded
    assert (names["tracked"].recorded, names["tracked"].differs) == (True, False)
    assert (host.used(user), host.counter(user)) == (912, 10_000 - 912)
    assert_true(host)


@pytest.mark.parametrize("module", ["utils", "decorators"])
def test_a_project_keeps_its_paths_by_the_two_files_of_the_manual(module: str) -> None:
    file = ROOT / "tests" / "hosts" / "django_drf" / "billing" / f"{module}.py"
    assert file.read_text() == code_under(MANUAL, f"`billing/{module}.py`")


@pytest.mark.parametrize(("name", "text"), [("MANUAL", MANUAL), ("SPECIFICATION", SPECIFICATION)])
def test_every_block_of_the_manual_and_the_specification_is_run_by_a_test(name: str, text: Path) -> None:
    hosts = "".join(file.read_text() for file in (ROOT / "tests" / "hosts").rglob("*.py"))
    hosts = re.sub(r"\(\s+", "(", hosts)
    headings = {heading for heading, _ in python_under_headings(text)} - KEPT_PATHS
    assert len(headings) > 5
    assert [title for title in headings if not any(f"({name}, {q}{title}{q}" in hosts for q in "\"'")] == []


def test_the_settings_that_the_manual_names_exist() -> None:
    named = set(re.findall(rf"\b{PREFIX}[A-Z_]+", TEXT))
    assert named
    assert named <= {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
