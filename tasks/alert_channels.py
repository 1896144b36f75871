"""The channels that alerts are sent by: a signed webhook, and apprise if it is installed."""

import base64
import hashlib
import hmac
import importlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from trueup.errors import MissingExtraError, TrueupError
from trueup.extras import require_extra
from trueup.monitoring.alerts import Alert
from trueup.settings.alerts import WEBHOOK, AlertSettings


class AlertNotSentError(TrueupError):
    """An alert did not reach its receiver. `final` True: a retry can't succeed."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        self.final = final
        super().__init__(message)


def send(alert: Alert, settings: AlertSettings) -> None:
    """Send an alert to its channel. Raises `AlertNotSentError` if the channel is not configured or refuses it."""
    if alert.channel not in settings.channels:
        raise AlertNotSentError(f"{alert.channel} is no longer configured", final=True)
    if alert.channel == WEBHOOK:
        _send_webhook(alert, settings)
    else:
        _send_by_apprise(alert, settings)


def signature_headers(key: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers that let a receiver verify the sender and the time of a message.

    They follow Standard Webhooks (https://github.com/standard-webhooks/standard-webhooks): an HMAC-SHA256 over id,
    time and body, joined by dots. `key`: the shared secret. `timestamp`: Unix time in seconds. `body`: as sent.
    """
    signed = b".".join((message_id.encode(), str(timestamp).encode(), body))
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}


def _send_webhook(alert: Alert, settings: AlertSettings) -> None:
    assert settings.webhook_url is not None  # noqa: S101 - for the type checker: the caller checked the channel
    # Every attempt sends the same bytes, so that a receiver can detect duplicates.
    body = json.dumps(alert.payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    headers = signature_headers(settings.signing_key(), alert.payload["id"], int(time.time()), body)
    headers |= {"content-type": "application/json", "user-agent": "trueup"}
    try:
        with (
            # Follow no redirect: it could send the message to any host.
            httpx.Client(timeout=settings.webhook_timeout_seconds, follow_redirects=False) as client,
            # The response body is not needed and could be endless, so it is never read. httpx's timeout limits each
            # read, not the whole exchange: a server that sends one byte at a time could block the worker for days.
            _ended_after(3 * settings.webhook_timeout_seconds, client),
            client.stream("POST", settings.webhook_url.get_secret_value(), content=body, headers=headers) as answer,
        ):
            status = answer.status_code
    except Exception as error:  # httpx raises other errors than HTTPError for an unusable URL or proxy
        raise AlertNotSentError(f"the webhook did not answer: {type(error).__name__}") from error
    if 300 <= status < 400:
        raise AlertNotSentError(
            f"the webhook answered {status}, and redirects are not followed: set webhook_url to the final address"
        )
    if not 200 <= status < 300:
        # With 410 the receiver asks for no more messages.
        raise AlertNotSentError(f"the webhook answered {status}", final=status == 410)


@contextmanager
def _ended_after(seconds: float, client: httpx.Client) -> Iterator[None]:
    timer = threading.Timer(seconds, client.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _send_by_apprise(alert: Alert, settings: AlertSettings) -> None:
    try:
        require_extra("apprise", "alerts.apprise_urls", consequence="Nothing was sent.", otherwise="unset it")
    except MissingExtraError as error:
        raise AlertNotSentError(str(error)) from None
    apprise: Any = importlib.import_module("apprise")
    # Messages name the URL by its number, because the URL itself is a secret.
    name, notifier = settings.channels[alert.channel], apprise.Apprise()
    if not notifier.add(settings.apprise_url(alert.channel)):
        raise AlertNotSentError(f"apprise can't use {name}: correct that URL")
    if not notifier.notify(title=f"trueup: {alert.kind}", body=alert.payload["data"]["message"]):
        raise AlertNotSentError(f"apprise could not deliver to {name}")
