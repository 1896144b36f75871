"""The host's function gets each charge after its commit, at least once, and never stops one."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from tests.support import charge_callbacks
from tests.support.charge_callbacks import TOLD_VARIABLE, told
from tests.support.host import NOW, Host
from tests.support.sessions import run_at_once
from tests.support.waiting import wait_for
from tests.support.work import hold_tokens
from trueup.billing.token_hold import ai_tokens
from trueup.doctor.invariants import check_charge_events
from trueup.errors import SettingsError
from trueup.monitoring.status import read_gauges, read_status
from trueup.settings.settings import get_settings, read_settings
from trueup.tasks import upkeep
from trueup.usage.charge_events import deliver_charge_events
from trueup.usage.charges import Usage, record_charge
from trueup.usage.log import ai_usage, track_ai_usage
from trueup.worker.config import beat_schedule

USAGE = Usage(
    prompt_tokens=70,
    completion_tokens=30,
    total_tokens=80,
    response_time_ms=5,
    model_name="gpt-x",
    classes={"input": 50, "cached_input": 20, "output": 30},
)

Choose = Callable[[str], None]


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber(10_000)


@pytest.fixture
def on_charge(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Choose]:
    """Choose the host's function, by its name. At the end no thread delivers: it would use the next database."""
    monkeypatch.setenv(TOLD_VARIABLE, str(tmp_path / "told.jsonl"))

    def choose(name: str) -> None:
        monkeypatch.setenv("TRUEUP_ON_CHARGE", f"{charge_callbacks.__name__}.{name}")
        get_settings.cache_clear()

    yield choose
    wait_for(
        lambda: all(thread.name != "trueup-charge-events" for thread in threading.enumerate()),
        "no thread delivers events",
    )


def waiting(host: Host) -> int:
    return int(host.value("SELECT count(*) FROM trueup.charge_event"))


def test_the_function_gets_the_charge_and_is_called_once_if_it_returns(
    host: Host, connection: Connection, user: int, on_charge: Choose
) -> None:
    on_charge("remember")
    hold = hold_tokens(connection, user, 1_000, task="task")
    for _ in range(2):  # the second is a redelivery
        record_charge(connection, hold, call_key="1", usage=USAGE, now=NOW)
    assert (waiting(host), told()) == (1, [])
    assert deliver_charge_events() == (1, 0)
    [event] = told()
    assert event.pop("key") == host.value("SELECT log_id FROM trueup.charge")
    assert event == {
        "user_id": user,
        "task_id": "task",
        "feature_name": hold.feature_name,
        "section": hold.section,
        "model_name": "gpt-x",
        "prompt_tokens": 70,
        "completion_tokens": 30,
        "total_tokens": 80,
        "classes": {"input": 50, "cached_input": 20, "output": 30},
        "charged_at": NOW.isoformat(),
    }
    assert (deliver_charge_events(), waiting(host), len(told())) == ((0, 0), 0, 1)


def test_a_call_that_two_attempts_bought_is_two_events(
    host: Host, connection: Connection, user: int, on_charge: Choose
) -> None:
    on_charge("remember")
    first = hold_tokens(connection, user, 1_000, task="task", lease=0)
    second = hold_tokens(connection, user, 1_000, task="task")
    assert second.attempt == 2
    for hold in (second, first):
        record_charge(connection, hold, call_key="1", usage=USAGE)
    assert deliver_charge_events() == (2, 0)
    assert len({event["key"] for event in told()}) == 2


def test_a_charge_that_is_rolled_back_is_no_event(
    host: Host, database: str, connection: Connection, user: int, on_charge: Choose
) -> None:
    on_charge("remember")
    hold = hold_tokens(connection, user, 1_000)
    engine = create_engine(database, poolclass=NullPool)
    with engine.connect() as own:
        record_charge(own, hold, call_key="1", usage=USAGE)
        own.rollback()
    assert (deliver_charge_events(), told()) == ((0, 0), [])


def test_the_process_that_charges_tells_it_at_once(host: Host, user: int, on_charge: Choose) -> None:
    on_charge("remember")
    with ai_tokens(user, 500, "Summaries", "chat") as hold:
        hold.charge(prompt_tokens=200, completion_tokens=100, model_name="m", key="one")
        wait_for(told, "the function is told while the block runs")
    track_ai_usage(user, section="chat", prompt_tokens=5, completion_tokens=6, model_name="m", key="k")
    wait_for(lambda: len(told()) == 2, "the function gets reported usage")
    assert [(one["feature_name"], one["total_tokens"], one["user_id"]) for one in told()] == [
        ("Summaries", 300, user),
        (None, 11, user),
    ]
    assert told()[1]["task_id"] is None
    wait_for(lambda: not waiting(host), "no event is left")


def test_reported_usage_has_its_own_time_and_a_failed_call_is_no_event(
    host: Host, user: int, on_charge: Choose
) -> None:
    on_charge("remember")
    at = datetime(2020, 5, 17, 12, tzinfo=UTC)
    with pytest.raises(ZeroDivisionError), ai_usage(user, section="chat", key="a", model_name="m"):
        _ = 1 / 0
    for _ in range(2):
        track_ai_usage(
            user, section="chat", prompt_tokens=5, completion_tokens=6, model_name="m", key="a", created_at=at
        )
    wait_for(lambda: told() and not waiting(host), "the function is told")
    assert [(event["charged_at"], event["total_tokens"]) for event in told()] == [(at.isoformat(), 11)]


@pytest.mark.parametrize("name", ["fail", "absent", "asynchronous"])
def test_a_function_that_fails_stops_no_charge_and_is_called_again_later(
    host: Host, connection: Connection, user: int, on_charge: Choose, name: str
) -> None:
    on_charge(name)
    with ai_tokens(user, 500, "Summaries", "chat") as hold:
        assert hold.charge(prompt_tokens=200, completion_tokens=100, model_name="m").recorded
    event = "SELECT tries FROM trueup.charge_event WHERE last_error IS NOT NULL"
    wait_for(lambda: host.execute(event).scalar_one_or_none() == 1, "the failure is noted")
    assert host.used(user) == 300
    now = host.value("SELECT max(charged_at) FROM trueup.charge_event") + timedelta(days=1)
    pauses = []
    for _ in range(9):
        assert deliver_charge_events(now=now) == (0, 1)
        due = host.value("SELECT due_at FROM trueup.charge_event")
        assert deliver_charge_events(now=due - timedelta(microseconds=1)) == (0, 0)
        pauses.append((due - now).total_seconds())
        now = due
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    on_charge("remember")
    assert deliver_charge_events(now=now) == (1, 0)
    assert (len(told()), waiting(host)) == (1, 0)


def test_of_processes_that_deliver_at_once_one_delivers_each_event(
    host: Host, connection: Connection, user: int, on_charge: Choose
) -> None:
    on_charge("remember")
    hold = hold_tokens(connection, user, 9_000)
    for number in range(40):
        record_charge(connection, hold, call_key=str(number), usage=USAGE)
    results = run_at_once([deliver_charge_events] * 4)
    assert sum(delivered for delivered, _ in results) == 40
    assert len({event["key"] for event in told()}) == len(told()) == 40


def test_without_the_setting_a_charge_writes_no_event_and_beat_sends_no_task(
    host: Host, connection: Connection, user: int, on_charge: Choose
) -> None:
    record_charge(connection, hold_tokens(connection, user, 1_000), call_key="1", usage=USAGE)
    track_ai_usage(user, section="chat", prompt_tokens=5, completion_tokens=6, model_name="m", key="k")
    assert (waiting(host), deliver_charge_events()) == (0, (0, 0))
    assert "deliver-charge-events" not in beat_schedule(get_settings())
    on_charge("remember")
    assert beat_schedule(get_settings())["deliver-charge-events"]["task"] == upkeep.deliver_charge_events.name
    record_charge(connection, hold_tokens(connection, user, 1_000, task="2"), call_key="1", usage=USAGE)
    assert upkeep.deliver_charge_events() == {"delivered": 1, "failed": 0}


def test_events_that_wait_are_in_status_metrics_and_doctor(
    host: Host, connection: Connection, user: int, on_charge: Choose
) -> None:
    def finding() -> Any:
        [found] = check_charge_events(connection, get_settings())
        return found

    assert (finding().level, read_gauges(connection)["oldest_charge_event_seconds"][0]) == ("ok", None)
    on_charge("fail")
    record_charge(connection, hold_tokens(connection, user, 1_000), call_key="1", usage=USAGE, now=NOW)
    status = read_status(connection, now=NOW + timedelta(minutes=9))
    assert (status.charge_events, status.oldest_charge_event_seconds) == (1, 540)
    assert read_gauges(connection)["charge_events"][0] == 1
    assert (finding().level, "beat and a worker" in finding().remedy) == ("warning", True)
    assert deliver_charge_events() == (0, 1)
    assert "RuntimeError: no room for 80 tokens" in finding().what
    get_settings.cache_clear()


@pytest.mark.parametrize("path", ["remember", "shop figures.f", "shop.figures:f", ".f", "shop."])
def test_a_setting_that_is_no_dotted_path_is_refused_at_start(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_ON_CHARGE", path)
    with pytest.raises(SettingsError, match=r"on_charge \(TRUEUP_ON_CHARGE\): .* dotted path"):
        read_settings()
