from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import Connection

from tests.support.drift_history import add_drift, add_run, see_again
from tests.support.host import Host
from trueup.database.engine import connect, transaction
from trueup.monitoring.alerts import (
    RunNews,
    claim_due,
    findings_of,
    list_alerts,
    note_failed,
    note_sent,
    raise_alerts,
    raise_all,
    raise_test,
)
from trueup.reconcile.missed_runs import find_missed_runs
from trueup.settings.alerts import AlertSettings
from trueup.settings.settings import get_settings

pytestmark = pytest.mark.dated

URL = {"webhook_url": "https://alerts.example/x", "webhook_secret": "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldY"}


def settings(**values: Any) -> AlertSettings:
    return AlertSettings(**{**URL, "missed_run_seconds": 0, "missed_deep_run_seconds": 0, **values})


def news(**values: Any) -> RunNews:
    figures = {"checked": 100, "users": 0, "tokens": 0, "tokens_explained": 0, "defects": 0, "only_user": None}
    return RunNews(
        run_id=7,
        finished_at=datetime(2024, 11, 1, tzinfo=UTC),
        **{"status": "finished", "error": None, **figures, **values},
    )


def kinds(news: RunNews, **values: Any) -> list[str]:
    return [kind for kind, _ in findings_of(news, settings(**values))]


@pytest.fixture
def run(host: Host) -> int:
    """A run that found 5,300 newly drifted tokens of two users, 300 without a cause. Others are old or set aside."""
    old = add_run(host, started_at=datetime.now(UTC) - timedelta(days=2))
    run = add_run(host, started_at=datetime.now(UTC) - timedelta(minutes=5))
    see_again(host, add_drift(host, old, 4, 70_000, 0, action="review"), run)
    add_drift(host, run, 1, 15_000, 10_000, ("credit_without_grant", 5_000), action="review")
    add_drift(host, run, 2, 0, 300)
    add_drift(host, run, 3, 0, 9_000, ("missed_decrement", -9_000), action="waiting")
    return run


@pytest.mark.parametrize(
    ("found", "thresholds", "expected"),
    [
        ({"tokens": 999, "tokens_explained": 999}, {"tokens": 1_000}, []),
        ({"tokens": 1_000, "tokens_explained": 1_000}, {"tokens": 1_000}, ["tokens"]),
        ({"users": 5}, {"users": 5}, ["users"]),
        ({"users": 4}, {"users": 5}, []),
        ({"tokens": 4_000, "tokens_explained": 2_000}, {"unexplained_share": 0.5}, ["unexplained"]),
        ({"tokens": 4_001, "tokens_explained": 2_001}, {"unexplained_share": 0.5}, []),
        ({"tokens": 999}, {"unexplained_share": 0.5}, []),
        ({"tokens": 999}, {"unexplained_share": 0.5, "unexplained_tokens": 999}, ["unexplained"]),
        ({}, {"unexplained_share": 0.5}, []),
        ({"defects": 1}, {"defects": 1}, ["defects"]),
        ({"status": "failed", "error": "disk full"}, {}, ["failed"]),
        ({"tokens": 10**9, "only_user": "1"}, {"tokens": 1}, []),
        ({"tokens": 10**9, "users": 10**6, "defects": 9}, {}, []),
    ],
)
def test_a_run_raises_alerts_at_the_thresholds(
    found: dict[str, Any], thresholds: dict[str, Any], expected: list[str]
) -> None:
    assert kinds(news(**found), **thresholds) == expected


def test_only_new_drifts_that_are_not_set_aside_count(host: Host, connection: Connection, run: int) -> None:
    assert raise_alerts(connection, run, settings=settings(tokens=5_300, users=2)) == 2
    by_kind = {alert.kind: alert for alert in list_alerts(connection)}
    data = by_kind["tokens"].payload["data"]
    assert (data["tokens"], data["users"], data["tokens_unexplained"], data["run_id"]) == (5_300, 2, 300, run)
    assert by_kind["users"].payload["type"] == "trueup.users"
    assert by_kind["users"].payload["id"] != by_kind["tokens"].payload["id"]
    host.execute("UPDATE trueup.reconcile_run SET alerted_at = NULL")
    assert raise_alerts(connection, run, settings=settings(tokens=5_301, users=3)) == 0


def test_the_same_finding_is_one_alert_on_each_channel(connection: Connection, run: int) -> None:
    both = settings(tokens=1, apprise_urls=["json://localhost"])

    def raise_again(_: int) -> int:
        with connect() as own:
            return raise_alerts(own, run, settings=both)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(raise_again, range(8))) == 2
    assert sorted(alert.channel.partition(":")[0] for alert in list_alerts(connection)) == ["apprise", "webhook"]


def test_an_interrupted_raise_is_repeated_without_a_second_alert(host: Host, connection: Connection, run: int) -> None:
    assert raise_alerts(connection, run, settings=settings(tokens=1)) == 1
    host.execute("UPDATE trueup.reconcile_run SET alerted_at = NULL")
    assert raise_alerts(connection, run, settings=settings(tokens=1)) == 0
    assert host.value("SELECT alerted_at IS NOT NULL FROM trueup.reconcile_run WHERE id = :id", id=run)


def test_recent_runs_without_alerts_are_found_and_old_ones_are_skipped(
    host: Host, connection: Connection, run: int
) -> None:
    old = add_run(host, started_at=datetime.now(UTC) - timedelta(days=2))
    add_drift(host, old, 1, 9_999, 0, ("manual_edit", 9_999))
    add_drift(host, add_run(host, status="running", started_at=datetime.now(UTC)), 1, 9_999, 0)
    assert raise_all(connection, settings=settings(tokens=1)) == 1
    assert [alert.key for alert in list_alerts(connection)] == [f"run:{run}:tokens"]
    assert raise_all(connection, settings=settings(tokens=1)) == 0


def test_a_missed_run_is_one_alert_for_each_gap(host: Host, connection: Connection) -> None:
    ended = datetime.now(UTC) - timedelta(minutes=10)
    add_run(host, started_at=ended, finished_at=ended)
    # A run over one user and a failed run do not count.
    add_run(host, started_at=datetime.now(UTC), finished_at=datetime.now(UTC), only_user="1")
    add_run(host, started_at=datetime.now(UTC), finished_at=datetime.now(UTC), status="interrupted")
    for seconds in (900, 0):
        assert find_missed_runs(connection, settings=settings(missed_run_seconds=seconds)) == []
    strict = settings(missed_run_seconds=300)
    assert [raise_all(connection, settings=strict) for _ in range(3)] == [1, 0, 0]
    [alert] = list_alerts(connection)
    assert (alert.kind, alert.payload["data"]["seconds"] // 10) == ("missed", 60)
    add_run(host, started_at=ended, finished_at=ended + timedelta(minutes=1))
    assert raise_all(connection, settings=strict) == 1


def test_a_missing_first_run_is_counted_from_the_installation(host: Host, connection: Connection) -> None:
    host.execute("UPDATE trueup.installation SET installed_at = now()")  # a copied template may be old
    strict = settings(missed_run_seconds=None)
    assert raise_all(connection, settings=strict) == 0
    host.execute("UPDATE trueup.installation SET installed_at = now() - interval '1801 seconds'")
    assert raise_all(connection, settings=strict) == 1


def test_a_missed_deep_run_is_a_separate_alert(
    host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = datetime.now(UTC) - timedelta(hours=2)
    add_run(host, started_at=ended, finished_at=ended, kind="deep")
    add_run(host, started_at=datetime.now(UTC), finished_at=datetime.now(UTC))
    # A run that has not ended does not count.
    add_run(host, started_at=datetime.now(UTC), finished_at=None, status="running", kind="deep")
    both = {"missed_run_seconds": 3600, "missed_deep_run_seconds": 3600}
    assert [raise_all(connection, settings=settings(**both)) for _ in range(2)] == [1, 0]
    [alert] = list_alerts(connection)
    assert (alert.kind, alert.payload["type"]) == ("missed_deep", "trueup.missed_deep")
    assert alert.payload["data"]["message"].startswith("No deep reconcile run has finished for 7,200 s")
    # The default is two intervals; without deep runs there is no alert.
    by_default = settings(missed_deep_run_seconds=None)
    for interval, gaps in ((3_000, 1), (3_700, 0), (0, 0)):
        monkeypatch.setenv("TRUEUP_RECONCILE_DEEP_INTERVAL_SECONDS", str(interval))
        get_settings.cache_clear()
        assert len(find_missed_runs(connection, settings=by_default)) == gaps
    monkeypatch.undo()
    get_settings.cache_clear()


def test_each_apprise_url_has_its_own_alert_in_any_order(connection: Connection, run: int) -> None:
    urls = ["json://a.example/hunter2", "json://b.example/hunter2"]
    both = settings(tokens=1, apprise_urls=urls)
    assert raise_alerts(connection, run, settings=both) == 3
    assert len({alert.payload["id"] for alert in list_alerts(connection)}) == 1
    channels = {alert.channel for alert in list_alerts(connection)}
    assert channels == {"webhook", *settings(apprise_urls=[*reversed(urls), urls[0]]).channels}
    assert not any("hunter2" in channel or "example" in channel for channel in channels)
    assert [both.channels[channel] for channel in both.channels][1:] == [
        "number 1 of apprise_urls",
        "number 2 of apprise_urls",
    ]
    assert both.apprise_url(list(both.channels)[2]) == urls[1]
    assert both.apprise_url("apprise:00000000") is None


def test_without_a_channel_nothing_is_raised(connection: Connection, run: int) -> None:
    assert raise_alerts(connection, run) == 0
    assert raise_all(connection) == 0
    assert list_alerts(connection) == []


def test_two_senders_at_once_never_have_the_same_alert(host: Host, connection: Connection) -> None:
    for _ in range(12):
        raise_test(connection, settings=settings())
    host.execute("UPDATE trueup.alert SET next_attempt_at = now() - interval '1 second'")

    def take_all(_: int) -> list[int]:
        taken = []
        with connect() as own:
            while claimed := claim_due(own):
                taken.append(claimed[0].id)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [number for batch in pool.map(take_all, range(4)) for number in batch]
    assert sorted(taken) == sorted(alert.id for alert in list_alerts(connection))


def test_an_alert_that_another_sender_is_claiming_is_skipped(host: Host, connection: Connection) -> None:
    raise_test(connection, settings=settings())
    host.execute("UPDATE trueup.alert SET next_attempt_at = now() - interval '1 second'")
    with transaction() as other:
        assert len(claim_due(other)) == 1
        assert claim_due(connection) == []


def test_the_alert_of_a_dead_sender_becomes_due_again_and_its_late_result_is_ignored(
    host: Host, connection: Connection
) -> None:
    [first] = raise_test(connection, settings=settings())
    assert claim_due(connection) == []
    host.execute("UPDATE trueup.alert SET next_attempt_at = now() - interval '1 second'")
    [second] = claim_due(connection)
    assert (second.id, second.attempts, second.payload["id"]) == (first.id, 2, first.payload["id"])
    note_failed(connection, first, "too late", final=True)
    assert list_alerts(connection)[0].status == "waiting"
    note_sent(connection, first)
    note_failed(connection, second, "no", final=True)
    assert list_alerts(connection)[0].status == "sent"


def test_a_sender_that_dies_on_every_attempt_uses_up_the_attempts(host: Host, connection: Connection) -> None:
    few = settings(max_attempts=3)
    raise_test(connection, settings=few)
    host.execute("UPDATE trueup.alert SET error = 'the webhook answered 500'")
    for attempt in (2, 3, None, None):
        host.execute("UPDATE trueup.alert SET next_attempt_at = now() - interval '1 second'")
        assert [alert.attempts for alert in claim_due(connection, settings=few)] == ([attempt] if attempt else [])
        # While the last attempt may still be in progress, the alert is not given up.
        assert list_alerts(connection)[0].status == ("waiting" if attempt else "failed")
        assert claim_due(connection, settings=few) == []
    error = "the sender recorded no result of attempt 3, the last one; before that: the webhook answered 500"
    assert list_alerts(connection)[0].error == error


def test_the_waits_between_sendings_grow_up_to_an_hour(host: Host, connection: Connection) -> None:
    raise_test(connection, settings=settings())
    waits = []
    for _ in range(10):
        host.execute("UPDATE trueup.alert SET next_attempt_at = now() - interval '1 second'")
        [alert] = claim_due(connection)
        note_failed(connection, alert, "no", final=False)
        waits.append(round(host.value("SELECT extract(epoch FROM next_attempt_at - now()) FROM trueup.alert")))
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"webhook_secret": None}, "without webhook_secret"),
        ({"webhook_secret": "short"}, "too short"),
        ({"webhook_secret": "whsec_!!!"}, "is no Base64"),
        ({"webhook_secret": "whsec_QUJD"}, "too short"),
        ({"webhook_url": "http://alerts.example/x"}, "is not https"),
        ({"webhook_url": "http://127.0.0.1.example/x"}, "is not https"),
        ({"webhook_url": "ftp://alerts.example/x"}, "give a URL"),
        ({"webhook_url": "https://"}, "give a URL"),
        ({"webhook_url": "https://a:port/"}, "give a URL"),
        ({"webhook_url": None, "webhook_secret": None, "tokens": 5}, "no alert could be sent"),
        ({"unexplained_share": 1.5}, "less than or equal to 1"),
        ({"tokns": 5}, "Extra inputs"),
    ],
)
def test_settings_that_would_not_work_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AlertSettings(**{**URL, **values})


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://localhost/x", "http://[::1]:9/x", "https://a.example"])
def test_a_webhook_on_this_machine_or_behind_tls_is_accepted(url: str) -> None:
    assert list(AlertSettings(**{**URL, "webhook_url": url}).channels) == ["webhook"]
    assert AlertSettings(**{**URL, "webhook_url": "http://b.example", "webhook_allow_http": True}).channels


def test_a_secret_is_decoded_by_its_prefix() -> None:
    assert AlertSettings(**URL).signing_key() == b"ABCDEFGHIJKLMNOPQRSTUVWX"
    assert AlertSettings(**URL | {"webhook_secret": SecretStr("s" * 16)}).signing_key() == b"s" * 16
