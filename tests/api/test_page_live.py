"""A real server sends the changes of the live page to the browsers that look at it, and to no others."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from tests.api.test_server import served
from tests.support.api import OPERATOR, bearer
from tests.support.host import Host
from tests.support.page import credited
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from tests.support.worker import running_worker
from trueup.api.page.live import Live
from trueup.api.page.parts import PACKAGE
from trueup.api.page.snapshot import Snapshot, read_snapshot
from trueup.cli.client import celery_client
from trueup.database.engine import connect
from trueup.host.mapping import UserIdType
from trueup.reports.pages import environment
from trueup.settings.settings import get_settings
from trueup.worker.dead_letters import drop_letters

OPS = bearer(None, sub="ops", scope=OPERATOR)


def events_of(stream: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the data of each event with parts."""
    for line in stream.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


@contextmanager
def watching(client: httpx.Client, seen: str = "") -> Iterator[Iterator[dict[str, Any]]]:
    with client.stream("GET", "/events", params={"seen": seen}, headers=OPS) as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        yield events_of(stream)


def open_pages(client: httpx.Client) -> float:
    """Return how many pages the server streams to now."""
    lines = client.get("/metrics", headers=OPS).text.splitlines()
    [shown] = [line for line in lines if line.startswith("trueup_http_requests_in_flight ")]
    return float(shown.split()[1]) - 1  # without this request itself


def test_a_change_reaches_every_open_page_and_only_the_parts_that_changed(host: Host, tmp_path: Path) -> None:
    with served(tmp_path / "api.log") as (_, client), ExitStack() as pages:
        watched = [pages.enter_context(watching(client)) for _ in range(5)]
        first = [next(events) for events in watched]
        assert first[0]["parts"].keys() >= {"summary", "review", "risk", "holds", "drift", "runs", "queues", "alerts"}
        assert [one["parts"] for one in first] == [first[0]["parts"]] * 5
        user = credited(host)
        for events in watched:
            changed: dict[str, str] = {}
            for event in events:
                changed |= event["parts"]
                if "review" in changed:
                    break
            assert f"<bdi>{user}</bdi>" in changed["review"]
            assert "holds" not in changed
            assert event["say"] == "1 drift in review."


def test_a_page_that_has_a_state_gets_only_what_came_later(host: Host, tmp_path: Path) -> None:
    with served(tmp_path / "api.log") as (_, client):
        page = client.get("/", headers=OPS).text
        seen = page.partition('data-seen="')[2].partition('"')[0]
        credited(host)
        with watching(client, seen) as events:
            for event in events:
                assert "denials" not in event["parts"]
                if "review" in event["parts"]:
                    break
        with watching(client, "0000-7") as events:  # of a server that was restarted
            assert "denials" in next(events)["parts"]


def test_a_page_that_goes_away_is_noticed_and_then_nothing_is_read(host: Host, tmp_path: Path) -> None:
    with served(tmp_path / "api.log") as (_, client):
        with ExitStack() as pages:
            watched = [pages.enter_context(watching(client)) for _ in range(10)]
            for events in watched:
                next(events)
            assert open_pages(client) == 10
        wait_for(lambda: open_pages(client) == 0, "the server notices that the pages have gone")
        # The next reading would come within seconds, if one came.
        idle = (
            "SELECT max(query_start) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        last = host.value(idle)
        wait_for(lambda: host.value("SELECT clock_timestamp() - :last > interval '5 s'", last=last), "five seconds")
        assert host.value(idle) == last


def test_queues_and_workers_are_shown(host: Host, tmp_path: Path) -> None:
    with celery_client(get_settings()) as app, app.connection_for_write() as connection:
        drop_letters(connection.default_channel.client, None)  # those of earlier tests
    with (
        running_worker(tmp_path / "worker.log"),
        served(tmp_path / "api.log") as (_, client),
        watching(client) as events,
    ):
        shown = ""
        for event in events:
            shown = event["parts"].get("queues", shown)
            if "Workers that answer" in shown:
                break
    assert "trueup-ai" in shown
    assert "Dead letters: 0" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_stops_at_once_while_pages_are_open(database: str, tmp_path: Path, number: signal.Signals) -> None:
    with served(tmp_path / "api.log") as (process, client), watching(client) as events:
        next(events)
        process.send_signal(number)
        list(events)  # the stream ends by itself
        process.wait(DEADLINE_SECONDS)
        assert process.returncode in (0, -number)
    assert "Traceback" not in (tmp_path / "api.log").read_text()


@pytest.fixture
def live(database: str) -> Live:
    return Live(environment(PACKAGE), "bigint", None)


async def stays() -> bool:
    return False


def test_many_pages_share_one_reading(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[float] = []

    def counted(user_id_type: UserIdType) -> Snapshot:
        readings.append(time.monotonic())
        return read_snapshot(user_id_type)

    monkeypatch.setattr("trueup.api.page.live.read_snapshot", counted)

    async def watch() -> None:
        streams = [live.events("", stays) for _ in range(50)]
        # The hint how long to wait before a new connection, then the first parts.
        await asyncio.gather(*(anext(stream) for stream in streams))
        first = await asyncio.gather(*(anext(stream) for stream in streams))
        assert len(set(first)) == 1
        assert live.open_pages == 50
        assert len(readings) == 1
        await asyncio.gather(*(stream.aclose() for stream in streams))
        assert live.open_pages == 0
        live.close()

    asyncio.run(watch())


def test_a_slow_database_rests_nine_times_as_long_as_it_worked(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(user_id_type: UserIdType) -> Snapshot:
        with connect() as connection:
            connection.execute(text("SELECT pg_sleep(0.3)"))
        return read_snapshot(user_id_type)

    monkeypatch.setattr("trueup.api.page.live.read_snapshot", slow)
    asyncio.run(live.view())
    assert live.pause_seconds >= 2.7


def test_a_quiet_stream_has_heartbeats_and_ends_to_check_the_login_again(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.api.page.live.HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr("trueup.api.page.live.STREAM_SECONDS", 0.5)

    async def watch() -> list[bytes]:
        seen = live.identify(await live.view())
        sent = [event async for event in live.events(seen, stays)]
        live.close()
        return sent

    sent = asyncio.run(watch())
    assert sent[0] == b"retry: 3000\n\n"
    assert set(sent[1:]) == {b": still here\n\n"}


def test_more_pages_than_the_limit_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trueup.api.page.views.MAX_PAGES", 0)
    answer = client.get("/events", headers=OPS)
    assert (answer.status_code, "pages are open already" in answer.text) == (503, True)
