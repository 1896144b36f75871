"""How alerts leave: a signed webhook, and apprise where it is installed."""

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
    """An alert did not reach its receiver. `final`: trying again won't help."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        self.final = final
        super().__init__(message)


def send(alert: Alert, settings: AlertSettings) -> None:
    """Send an alert to its channel. Raises `AlertNotSentError`."""
    if alert.channel not in settings.channels:
        raise AlertNotSentError(f"{alert.channel} is no longer set", final=True)
    if alert.channel == WEBHOOK:
        _send_webhook(alert, settings)
    else:
        _send_by_apprise(alert, settings)


def signature_headers(key: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers by which a receiver knows who sent a message, and when: those of Standard Webhooks.

    https://github.com/standard-webhooks/standard-webhooks: HMAC-SHA256 over id, time and body, joined by dots.
    """
    signed = b".".join((message_id.encode(), str(timestamp).encode(), body))
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}


def _send_webhook(alert: Alert, settings: AlertSettings) -> None:
    assert settings.webhook_url is not None  # noqa: S101 - for the type checker: it is among the channels
    # The same bytes each time, so that a receiver may compare them.
    body = json.dumps(alert.payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    headers = signature_headers(settings.signing_key(), alert.payload["id"], int(time.time()), body)
    headers |= {"content-type": "application/json", "user-agent": "trueup"}
    try:
        with (
            # A redirect could lead anywhere, and would be trusted with the message.
            httpx.Client(timeout=settings.webhook_timeout_seconds, follow_redirects=False) as client,
            # Its answer's body says nothing to us, so it is not read: it could be endless.
            # httpx limits each read; a server that drips would have us for days.
            _ended_after(3 * settings.webhook_timeout_seconds, client),
            client.stream("POST", settings.webhook_url.get_secret_value(), content=body, headers=headers) as answer,
        ):
            status = answer.status_code
    except Exception as error:  # a URL or proxy that httpx can't use is no HTTPError
        raise AlertNotSentError(f"the webhook gave no answer: {type(error).__name__}") from error
    if 300 <= status < 400:
        raise AlertNotSentError(f"the webhook answered {status}: redirects are not followed, correct webhook_url")
    if not 200 <= status < 300:
        # 410 is the receiver's word that it wants no more.
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
    # The URL itself is a secret.
    name, notifier = settings.channels[alert.channel], apprise.Apprise()
    if not notifier.add(settings.apprise_url(alert.channel)):
        raise AlertNotSentError(f"apprise does not know what {name} is")
    if not notifier.notify(title=f"trueup: {alert.kind}", body=alert.payload["data"]["message"]):
        raise AlertNotSentError(f"apprise could not deliver to {name}")
