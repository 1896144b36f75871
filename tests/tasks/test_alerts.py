"""Alerts are sent to a real HTTP server on this machine, through every failure that a receiver can cause."""

import base64
import hashlib
import hmac
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import ClassVar

import pytest
from pytest_httpserver import HTTPServer
from sqlalchemy import Connection
from werkzeug import Request, Response

from tests.cli.conftest import trueup, trueup_json
from tests.support.drift_history import add_drift, add_run
from tests.support.host import Host
from trueup.monitoring.alerts import Alert, list_alerts
from trueup.settings.settings import get_settings
from trueup.tasks import TASK_MODULES
from trueup.tasks.alerts import check_alerts
from trueup.worker.config import celery_config

SECRET = "a secret of enough bytes"
Configure = Callable[..., None]


@pytest.fixture
def configure(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configure]:
    """Give a function that changes the alert settings."""

    def change(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"TRUEUP_ALERTS__{name.upper()}", value)
        get_settings.cache_clear()

    yield change
    get_settings.cache_clear()


@pytest.fixture
def webhook(httpserver: HTTPServer, configure: Configure) -> HTTPServer:
    configure(webhook_url=httpserver.url_for("/hook"), webhook_secret=SECRET, missed_run_seconds="0", tokens="1000")
    return httpserver


@pytest.fixture
def drifted(host: Host) -> int:
    """A run that just ended and found 5,000 drifted tokens."""
    run = add_run(host, started_at=datetime.now(UTC) - timedelta(minutes=1))
    add_drift(host, run, 1, 15_000, 10_000, ("credit_without_grant", 5_000), action="review")
    return run


def due(host: Host) -> None:
    """Make every waiting alert due."""
    host.execute("UPDATE trueup.alert SET next_attempt_at = now() - interval '1 second'")


def only_alert(connection: Connection) -> Alert:
    [alert] = list_alerts(connection)
    return alert


def test_beat_checks_for_alerts_each_minute_if_a_channel_is_configured(host: Host, configure: Configure) -> None:
    assert "check-alerts" not in celery_config(get_settings())["beat_schedule"]
    configure(apprise_urls='["json://127.0.0.1"]')
    config = celery_config(get_settings())
    assert config["beat_schedule"]["check-alerts"]["task"] == check_alerts.name
    assert config["beat_schedule"]["check-alerts"]["schedule"] == timedelta(minutes=1)
    assert config["task_routes"][check_alerts.name] == {"queue": "trueup-reconcile"}
    assert "trueup.tasks.alerts" in TASK_MODULES


def test_an_alert_is_sent_once_with_a_signature_that_its_receiver_can_verify(
    webhook: HTTPServer, host: Host, connection: Connection, drifted: int
) -> None:
    webhook.expect_request("/hook", method="POST").respond_with_data("", status=204)
    assert check_alerts() == {"raised": 1, "sent": 1, "failed": 0}
    assert check_alerts() == {"raised": 0, "sent": 0, "failed": 0}
    [(request, _)] = webhook.log
    body, headers = request.get_data(), request.headers
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    payload = json.loads(body)
    assert (payload["type"], payload["id"]) == ("trueup.tokens", headers["webhook-id"])
    assert (payload["data"]["tokens"], payload["data"]["run_id"]) == (5_000, drifted)
    alert = only_alert(connection)
    assert (alert.status, alert.attempts, alert.error) == ("sent", 1, None)


def test_a_failed_alert_is_sent_again_later_with_the_same_id(
    webhook: HTTPServer, host: Host, connection: Connection, drifted: int
) -> None:
    webhook.expect_ordered_request("/hook").respond_with_data("", status=500)
    webhook.expect_ordered_request("/hook").respond_with_data("", status=429)
    webhook.expect_ordered_request("/hook").respond_with_data("", status=200)
    assert check_alerts()["failed"] == 1
    assert "500" in (only_alert(connection).error or "")
    assert check_alerts() == {"raised": 0, "sent": 0, "failed": 0}
    due(host)
    assert check_alerts()["failed"] == 1
    due(host)
    assert check_alerts()["sent"] == 1
    sent = [(request.headers["webhook-id"], request.get_data()) for request, _ in webhook.log]
    assert len(sent) == 3
    assert len(set(sent)) == 1
    assert only_alert(connection).status == "sent"


def test_a_slow_receiver_is_given_up_after_the_timeout(
    webhook: HTTPServer, configure: Configure, connection: Connection, drifted: int
) -> None:
    configure(webhook_timeout_seconds="0.2")

    given_up = threading.Event()

    def slow(request: Request) -> Response:
        given_up.wait(10)
        return Response(status=200)

    webhook.expect_request("/hook").respond_with_handler(slow)
    assert check_alerts()["failed"] == 1
    assert only_alert(connection).error == "the webhook did not answer: ReadTimeout"
    given_up.set()
    # Wait for the request to end, so that it does not appear in the log of another test.
    deadline = time.monotonic() + 10
    while not webhook.log and time.monotonic() < deadline:
        time.sleep(0.01)


def test_an_unreachable_receiver_fails_the_alert_and_not_the_task(
    configure: Configure, host: Host, connection: Connection, drifted: int, free_port: int
) -> None:
    configure(webhook_url=f"http://127.0.0.1:{free_port}/hook?key=hunter2", webhook_secret=SECRET, tokens="1")
    configure(missed_run_seconds="0")
    assert check_alerts()["failed"] == 1
    error = only_alert(connection).error or ""
    assert error == "the webhook did not answer: ConnectError"


def test_a_redirect_is_not_followed(webhook: HTTPServer, connection: Connection, drifted: int) -> None:
    webhook.expect_request("/hook").respond_with_data("", status=307, headers={"location": webhook.url_for("/other")})
    webhook.expect_request("/other").respond_with_data("", status=200)
    assert check_alerts()["failed"] == 1
    assert [request.path for request, _ in webhook.log] == ["/hook"]
    assert "redirects are not followed" in (only_alert(connection).error or "")


def test_an_alert_fails_after_its_last_attempt_or_when_the_receiver_answers_410(
    webhook: HTTPServer, configure: Configure, host: Host, connection: Connection, drifted: int
) -> None:
    configure(max_attempts="2")
    webhook.expect_request("/hook").respond_with_data("", status=503)
    for status in ("waiting", "failed"):
        assert check_alerts()["failed"] == 1
        assert only_alert(connection).status == status
        due(host)
    assert check_alerts() == {"raised": 0, "sent": 0, "failed": 0}
    webhook.clear()
    webhook.expect_request("/hook").respond_with_data("", status=410)
    host.execute("UPDATE trueup.alert SET status = 'waiting', attempts = 0")
    assert check_alerts()["failed"] == 1
    assert only_alert(connection).status == "failed"


def test_concurrent_senders_send_each_alert_once(
    webhook: HTTPServer, host: Host, connection: Connection, drifted: int
) -> None:
    webhook.expect_request("/hook").respond_with_handler(lambda request: time.sleep(0.05) or Response(status=200))
    for _ in range(5):
        add_drift(host, add_run(host, started_at=datetime.now(UTC)), 1, 9_000, 0)
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: check_alerts(), range(3)))
    assert sum(each["sent"] for each in done) == 6
    ids = [request.headers["webhook-id"] for request, _ in webhook.log]
    assert len(ids) == len(set(ids)) == 6


def test_alerts_of_a_channel_that_is_no_longer_configured_fail(
    webhook: HTTPServer, configure: Configure, host: Host, connection: Connection, drifted: int
) -> None:
    webhook.expect_request("/hook").respond_with_data("", status=500)
    check_alerts()
    configure(webhook_url="", webhook_secret="", tokens="1", apprise_urls='["json://127.0.0.1"]')
    due(host)
    host.execute("UPDATE trueup.reconcile_run SET alerted_at = now()")
    check_alerts()
    alert = only_alert(connection)
    assert (alert.status, alert.error) == ("failed", "webhook is no longer configured")


def test_without_apprise_the_alert_says_how_to_install_it(
    configure: Configure, connection: Connection, drifted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    configure(apprise_urls='["json://127.0.0.1"]', tokens="1", missed_run_seconds="0")
    assert check_alerts()["failed"] == 1
    error = only_alert(connection).error or ""
    assert "no module apprise" in error
    assert "pip install 'trueup[apprise]'; or unset it" in error


class FakeApprise:
    """The part of apprise's interface that trueup uses, for machines without apprise."""

    sent: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.urls: list[str] = []

    def add(self, url: str) -> bool:
        self.urls.append(url)
        return url.startswith("json://")

    def notify(self, *, title: str, body: str) -> bool:
        # As apprise does: send to each URL, and return whether all of them accepted.
        taken = ["refused" not in url for url in self.urls]
        self.sent.extend(url for url, ok in zip(self.urls, taken, strict=True) if ok and title and body)
        return all(taken)


def fake_apprise(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Install the fake module. Returns the list of URLs that it sends to."""
    module = ModuleType("apprise")
    module.__spec__ = ModuleSpec("apprise", None)  # marks it as installed for importlib.util.find_spec
    module.Apprise = FakeApprise  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apprise", module)
    monkeypatch.setattr(FakeApprise, "sent", [])
    return FakeApprise.sent


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("json://127.0.0.1/hunter2", None),
        ("nonsense://hunter2", "apprise can't use number 1 of apprise_urls: correct that URL"),
        ("json://refused/hunter2", "apprise could not deliver to number 1 of apprise_urls"),
    ],
)
def test_apprise_sends_if_it_is_installed_and_its_urls_stay_secret(
    configure: Configure,
    connection: Connection,
    drifted: int,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    error: str | None,
) -> None:
    fake_apprise(monkeypatch)
    configure(apprise_urls=json.dumps([url]), tokens="1", missed_run_seconds="0")
    check_alerts()
    alert = only_alert(connection)
    assert (alert.channel.partition(":")[0], alert.error) == ("apprise", error)
    assert "hunter2" not in trueup("settings").output + trueup("alerts", "list").output


def test_a_failing_url_does_not_resend_the_alert_to_the_others(
    configure: Configure, host: Host, connection: Connection, drifted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = fake_apprise(monkeypatch)
    urls = ["json://a", "json://refused", "json://b"]
    configure(apprise_urls=json.dumps(urls), tokens="1", missed_run_seconds="0")
    assert check_alerts() == {"raised": 3, "sent": 2, "failed": 1}
    for _ in range(2):
        due(host)
        assert check_alerts() == {"raised": 0, "sent": 0, "failed": 1}
    assert sorted(sent) == ["json://a", "json://b"]
    # The alert of a removed URL fails. The others keep their state, although their numbers change.
    configure(apprise_urls=json.dumps(urls[2:]))
    due(host)
    check_alerts()
    alerts = list_alerts(connection)
    assert sorted(alert.status for alert in alerts) == ["failed", "sent", "sent"]
    assert [alert.error for alert in alerts if alert.error] == [f"{failed_channel(alerts)} is no longer configured"]


def failed_channel(alerts: list[Alert]) -> str:
    (channel,) = (alert.channel for alert in alerts if alert.status == "failed")
    return channel


# An apprise plugin still imports imghdr on Python 3.11 and 3.12.
@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
def test_the_real_apprise_delivers_an_alert(
    httpserver: HTTPServer, configure: Configure, connection: Connection, drifted: int
) -> None:
    pytest.importorskip("apprise")
    httpserver.expect_request("/hook", method="POST").respond_with_data("", status=200)
    configure(apprise_urls=json.dumps([f"json://127.0.0.1:{httpserver.port}/hook"]), tokens="1", missed_run_seconds="0")
    assert check_alerts()["sent"] == 1
    [(request, _)] = httpserver.log
    assert "5,000 newly drifted tokens" in request.get_data(as_text=True)


def test_the_test_command_says_whether_each_channel_received_it(webhook: HTTPServer, connection: Connection) -> None:
    webhook.expect_ordered_request("/hook").respond_with_data("", status=200)
    webhook.expect_ordered_request("/hook").respond_with_data("", status=401)
    assert trueup("alerts", "test").stdout == "webhook: received\n"
    failed = trueup("alerts", "test", code=1)
    assert "webhook: not received: the webhook answered 401" in failed.stdout
    # A failed test message must not be sent again later.
    assert sorted(alert.status for alert in list_alerts(connection)) == ["failed", "sent"]
    assert json.loads(webhook.log[0][0].get_data())["type"] == "trueup.test"


def test_without_a_channel_the_test_command_names_the_missing_setting(host: Host) -> None:
    assert "TRUEUP_ALERTS__WEBHOOK_URL" in trueup("alerts", "test", code=1).stderr
    assert trueup("alerts", "list").stdout == "No alerts.\n"


def test_the_check_command_reports_a_missing_run_by_its_exit_code(
    webhook: HTTPServer, configure: Configure, host: Host, drifted: int
) -> None:
    webhook.expect_request("/hook").respond_with_data("", status=200)
    assert trueup("alerts", "check").stdout == "1 raised, 1 sent, 0 not received.\n"
    configure(missed_run_seconds="30")
    missing = trueup_json("alerts", "check", code=3)
    assert (missing["raised"], missing["sent"]) == (1, 1)
    assert 50 < missing["missed_seconds"] < 300
    webhook.clear()
    webhook.expect_request("/hook").respond_with_data("", status=500)
    configure(missed_run_seconds="0")
    host.execute("UPDATE trueup.alert SET status = 'waiting'")
    due(host)
    assert "0 raised, 0 sent, 2 not received." in trueup("alerts", "check", code=1).stdout
    configure(missed_deep_run_seconds="1")
    host.execute("UPDATE trueup.installation SET installed_at = now() - interval '1 hour'")
    shown = trueup("alerts", "check", code=3).stdout
    assert "No deep reconcile run has finished for 3,60" in shown
    gaps = trueup_json("alerts", "check", code=3)
    assert (gaps["missed_seconds"], gaps["missed_deep_seconds"] >= 3_600) == (None, True)


def test_the_list_of_alerts_shows_their_errors(webhook: HTTPServer, drifted: int) -> None:
    webhook.expect_request("/hook").respond_with_data("", status=500)
    check_alerts()
    [alert] = trueup_json("alerts", "list", "--waiting")["alerts"]
    assert (alert["key"], alert["status"], alert["attempts"]) == (f"run:{drifted}:tokens", "waiting", 1)
    assert "the webhook answered 500" in trueup("alerts", "list").stdout


@pytest.fixture
def free_port(httpserver: HTTPServer) -> int:
    """A port without a listener."""
    import socket

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port: int = closed.getsockname()[1]
    return port
