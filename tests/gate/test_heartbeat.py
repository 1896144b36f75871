"""The heartbeat of a process that serves requests. `tests/worker/test_heartbeat.py` tests that of a worker."""

import gc
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import datetime

import pytest

import trueup.settings.settings
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.waiting import wait_for
from trueup.billing.streaming import stream_with_tokens
from trueup.billing.token_hold import ai_tokens
from trueup.gate import heartbeat
from trueup.llm.metering import MeteredModel
from trueup.llm.model import Message
from trueup.llm.providers.offline import offline_provider
from trueup.settings.settings import get_settings

PROMPT = [Message(role="user", content="Orders are sent in two days. Returns are free.")]


@pytest.fixture
def user(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Give a user, in a process that beats a few times in a second."""
    monkeypatch.setenv("TRUEUP_MODEL_TIMEOUT_SECONDS", "0.5")
    monkeypatch.setattr(trueup.settings.settings, "LEASE_MARGIN_SECONDS", 0)
    monkeypatch.setattr(heartbeat, "_heartbeat", heartbeat.Heartbeat())
    get_settings.cache_clear()
    yield host.subscriber(10_000)
    get_settings.cache_clear()


def expiry(host: Host, task: str) -> datetime:
    found: datetime = host.value("SELECT expires_at FROM trueup.hold WHERE task_id = :task", task=task)
    return found


def wait_for_beats(host: Host, hold: ai_tokens, beats: int = 2) -> None:
    """Wait until the hold has been renewed so often."""
    for beat in range(beats):
        before = expiry(host, hold.hold.task_id)
        wait_for(lambda before=before: expiry(host, hold.hold.task_id) > before, f"beat {beat + 1}")  # type: ignore[misc]


def count_threads() -> int:
    return sum(thread.name == "trueup-heartbeat" for thread in threading.enumerate())


def wait_until_the_thread_waits_in(function: str) -> None:
    thread = heartbeat._heartbeat._thread
    assert thread is not None
    assert thread.daemon  # a process that ends does not wait for it

    def is_there() -> bool:
        names = [frame.name for frame in traceback.extract_stack(sys._current_frames()[thread.ident])]
        at = names.index("_beat_for_ever") + 1
        return names[at : at + 1] == [function]

    wait_for(is_there, f"the heartbeat's thread to be in {function}")


def almost_over(host: Host) -> None:
    """Leave every hold as little time as a heartbeat needs."""
    host.execute("UPDATE trueup.hold SET expires_at = clock_timestamp() + interval '5 seconds'")


def test_a_block_that_works_longer_than_its_holds_time_keeps_its_hold(host: Host, user: int) -> None:
    with ai_tokens(user, 1_000) as hold:
        almost_over(host)
        wait_for_beats(host, hold)
        charge = hold.charge(prompt_tokens=200, completion_tokens=100, model_name="m")
        assert (charge.late, charge.tokens_over) == (False, 0)
    assert host.value("SELECT status FROM trueup.hold") == "settled"
    assert_true(host)


def test_a_stream_that_is_read_longer_than_its_holds_time_keeps_its_hold(host: Host, user: int) -> None:
    model = MeteredModel(offline_provider)
    holds = []

    def chunks(hold: ai_tokens) -> Iterator[str]:
        holds.append(hold)
        for _ in "12":
            yield from model.stream(PROMPT)

    stream = stream_with_tokens(chunks, user, 3_000)
    next(stream)
    almost_over(host)
    wait_for_beats(host, holds[0])
    assert list(stream)
    assert host.value("SELECT status FROM trueup.hold") == "settled"
    assert host.execute("SELECT late FROM trueup.charge").scalars().all() == [False, False]
    assert_true(host)


def test_the_hold_of_a_block_that_was_dropped_without_its_end_is_not_renewed(host: Host, user: int) -> None:
    dropped = ai_tokens(user, 1_000)
    dropped.__enter__()
    wait_for_beats(host, dropped)
    task = dropped.hold.task_id
    del dropped
    gc.collect()
    with ai_tokens(user, 1_000) as other:
        wait_for_beats(host, other, beats=1)  # a beat may have begun before
        last = expiry(host, task)
        wait_for_beats(host, other)
    assert expiry(host, task) == last


def test_one_thread_beats_for_all_holds_waits_between_beats_and_rests_while_there_is_no_hold(
    host: Host, user: int
) -> None:
    before = count_threads()
    with ai_tokens(user, 1_000) as first, ai_tokens(user, 1_000) as second:
        for hold in (first, second):
            wait_for_beats(host, hold)
        assert count_threads() == before + 1
        wait_until_the_thread_waits_in("wait")
    wait_until_the_thread_waits_in("wait_for")
    with ai_tokens(user, 1_000) as later:
        wait_for_beats(host, later)


def test_beats_go_on_after_one_that_the_database_refused(
    host: Host, user: int, caplog: pytest.LogCaptureFixture
) -> None:
    with ai_tokens(user, 1_000) as hold:
        host.execute("ALTER FUNCTION trueup.keep_holds RENAME TO renamed")
        wait_for(lambda: "heartbeat failed, leases were not renewed holds=1" in caplog.text, "a beat that fails")
        host.execute("ALTER FUNCTION trueup.renamed RENAME TO keep_holds")
        wait_for_beats(host, hold)
