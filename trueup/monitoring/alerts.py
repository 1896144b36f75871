"""Alerts for operators. Each alert is a row before it is sent, and is sent once to each channel.

A sender claims a row for as long as one sending takes. Two senders never have the same alert, and an alert whose sender
died becomes due again. A receiver may therefore get an alert twice, always with the same id.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from trueup.reconcile.missed_runs import find_missed_runs
from trueup.settings.alerts import AlertSettings
from trueup.settings.settings import get_settings

# Longer than any sending takes. A sender that has not recorded a result by then is dead.
CLAIM_SECONDS = 180
FIRST_WAIT_SECONDS = 30
MAX_WAIT_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class Alert:
    """An alert for one channel. `payload`: the JSON to send. `sent_at` None: not sent yet. `error` None: no error."""

    id: int
    key: str
    kind: str
    channel: str
    payload: dict[str, Any]
    status: str
    attempts: int
    next_attempt_at: datetime
    created_at: datetime
    sent_at: datetime | None
    error: str | None


@dataclass(frozen=True, kw_only=True)
class RunNews:
    """Figures of the drifts that a finished run was the first to find, without those set aside. Tokens are counts."""

    run_id: int
    status: str
    error: str | None
    checked: int
    defects: int
    only_user: str | None
    finished_at: datetime
    users: int
    tokens: int
    tokens_explained: int


_COLUMNS = "id, key, kind, channel, payload, status, attempts, next_attempt_at, created_at, sent_at, error"

_NEWS = text(
    """
    SELECT r.id AS run_id, r.status, r.error, r.checked, r.defects, r.only_user, r.finished_at,
           count(DISTINCT d.user_id) AS users,
           coalesce(sum(abs(coalesce(d.observed, 0) - d.expected)), 0)::bigint AS tokens,
           coalesce(sum(d.tokens_explained), 0)::bigint AS tokens_explained
    FROM trueup.reconcile_run r
    LEFT JOIN trueup.drift d ON d.run_id = r.id AND d.action NOT IN ('tolerated', 'ignored', 'waiting')
    WHERE r.id = :run_id AND r.status IN ('finished', 'failed') AND r.alerted_at IS NULL
    GROUP BY r.id
    """
)

_RAISED = text("UPDATE trueup.reconcile_run SET alerted_at = clock_timestamp() WHERE id = :run_id")


def raise_alerts(connection: Connection, run_id: int, *, settings: AlertSettings | None = None) -> int:
    """Record the alerts for a run that has ended. Returns how many were recorded for the first time.

    Idempotent: the same finding is one alert. `settings` None: this process's settings.
    """
    settings = settings or get_settings().alerts
    row = connection.execute(_NEWS, {"run_id": run_id}).mappings().one_or_none()
    if row is None or not settings.channels:
        return 0
    raised = 0
    for kind, content in findings_of(RunNews(**row), settings):
        raised += len(_insert(connection, f"run:{run_id}:{kind}", kind, {"run_id": run_id, **content}, settings))
    # Last, so that an interrupted call is repeated.
    connection.execute(_RAISED, {"run_id": run_id})
    return raised


def findings_of(news: RunNews, settings: AlertSettings) -> list[tuple[str, dict[str, Any]]]:
    """Return the kind and content of each alert whose threshold the run reaches. Pure."""
    if news.only_user is not None:
        return []
    found: list[tuple[str, dict[str, Any]]] = []
    unexplained = max(0, news.tokens - news.tokens_explained)
    share = unexplained / news.tokens if news.tokens else 0.0
    figures = {"users": news.users, "tokens": news.tokens, "tokens_unexplained": unexplained, "checked": news.checked}

    def add(kind: str, threshold: float, message: str) -> None:
        found.append((kind, {"message": message, "threshold": threshold, **figures}))

    run = f"Reconcile run {news.run_id}"
    if news.status == "failed":
        found.append(("failed", {"message": f"{run} failed: {news.error or 'the reason is unknown'}", **figures}))
    if settings.tokens is not None and news.tokens >= settings.tokens:
        add("tokens", settings.tokens, f"{run} found {news.tokens:,} newly drifted tokens of {news.users:,} users.")
    if settings.users is not None and news.users >= settings.users:
        add("users", settings.users, f"{run} found newly drifted counters of {news.users:,} users.")
    if (
        settings.unexplained_share is not None
        and share >= settings.unexplained_share
        and unexplained >= settings.unexplained_tokens
    ):
        message = f"{run} can't explain {unexplained:,} of {news.tokens:,} newly drifted tokens ({share:.0%})."
        add("unexplained", settings.unexplained_share, message)
    if settings.defects is not None and news.defects >= settings.defects:
        add("defects", settings.defects, f"{run} found {news.defects:,} defects in trueup's own tables.")
    return found


_UNHEARD = text(
    """
    SELECT id FROM trueup.reconcile_run
    WHERE status IN ('finished', 'failed') AND alerted_at IS NULL
      AND finished_at > clock_timestamp() - interval '1 day'
    ORDER BY id LIMIT 100
    """
)


def raise_all(connection: Connection, *, settings: AlertSettings | None = None) -> int:
    """Record the alerts for ended runs that have none yet, and for missed runs. Returns how many were recorded."""
    settings = settings or get_settings().alerts
    if not settings.channels:
        return 0
    runs = connection.scalars(_UNHEARD).all()
    raised = sum(raise_alerts(connection, run_id, settings=settings) for run_id in runs)
    for missed in find_missed_runs(connection, settings=settings):
        # One alert for each gap, however long the gap becomes.
        key = f"{missed.kind}:{missed.last.isoformat()}"
        raised += len(_insert(connection, key, missed.kind, missed.content(), settings))
    return raised


def raise_test(connection: Connection, *, settings: AlertSettings | None = None) -> list[Alert]:
    """Record a test alert for each channel, claimed by the caller, and return them."""
    settings = settings or get_settings().alerts
    content = {"message": "This is a test of trueup's alerts. Nothing is wrong."}
    return _insert(connection, f"test:{uuid.uuid4()}", "test", content, settings, attempts=1)


_WRITE = text(
    f"""
    INSERT INTO trueup.alert (key, kind, channel, payload, status, attempts, next_attempt_at, created_at)
    SELECT :key, :kind, channel, CAST(:payload AS jsonb)
               || jsonb_build_object('timestamp', to_char(now.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')),
           'waiting', :attempts, now.at + make_interval(secs => :attempts * :claim_seconds), now.at
    FROM unnest(CAST(:channels AS text[])) AS channel, (SELECT clock_timestamp() AS at) AS now
    ON CONFLICT ON CONSTRAINT alert_once DO NOTHING
    RETURNING {_COLUMNS}
    """
)


def _insert(
    connection: Connection, key: str, kind: str, content: dict[str, Any], settings: AlertSettings, *, attempts: int = 0
) -> list[Alert]:
    """Record an alert for each channel that has none with this key, and return the recorded ones."""
    payload = {"id": f"trueup_{uuid.uuid4()}", "type": f"trueup.{kind}", "data": content}
    values = {
        "key": key,
        "kind": kind,
        "payload": json.dumps(payload),
        "channels": list(settings.channels),
        "attempts": attempts,
        "claim_seconds": CLAIM_SECONDS,
    }
    return [Alert(**row) for row in connection.execute(_WRITE, values).mappings()]


# An alert that is due after its last attempt has no recorded result, because its sender died. Give it up: a sender that
# dies on every attempt must not retry forever.
_GIVE_UP = text(
    """
    UPDATE trueup.alert SET status = 'failed',
                            error = left(concat_ws('; before that: ', 'the sender recorded no result of attempt '
                                                   || attempts || ', the last one', error), 500)
    WHERE id IN (
        SELECT id FROM trueup.alert
        WHERE status = 'waiting' AND attempts >= :most_attempts AND next_attempt_at <= clock_timestamp()
        FOR UPDATE SKIP LOCKED)
    """
)

# The claim is the counted attempt and the later time. It ends at that time, even if this process dies.
_CLAIM = text(
    f"""
    UPDATE trueup.alert SET attempts = attempts + 1,
                            next_attempt_at = clock_timestamp() + make_interval(secs => :claim_seconds)
    WHERE id IN (
        SELECT id FROM trueup.alert
        WHERE status = 'waiting' AND attempts < :most_attempts AND next_attempt_at <= clock_timestamp()
        ORDER BY next_attempt_at, id LIMIT :limit FOR UPDATE SKIP LOCKED)
    RETURNING {_COLUMNS}
    """
)


def claim_due(connection: Connection, *, limit: int = 1, settings: AlertSettings | None = None) -> list[Alert]:
    """Claim alerts that are due now, at most `limit`; no other sender gets them for `CLAIM_SECONDS`.

    Due alerts without attempts left are given up. `settings` None: this process's settings.
    """
    most = (settings or get_settings().alerts).max_attempts
    connection.execute(_GIVE_UP, {"most_attempts": most})
    values = {"limit": limit, "claim_seconds": CLAIM_SECONDS, "most_attempts": most}
    return [Alert(**row) for row in connection.execute(_CLAIM, values).mappings()]


_SENT = text(
    """
    UPDATE trueup.alert SET status = 'sent', sent_at = clock_timestamp(), error = NULL
    WHERE id = :id AND status <> 'sent'
    """
)

# Only the newest attempt may record a failure; the failure of an earlier one is out of date.
_FAILED = text(
    """
    UPDATE trueup.alert SET status = CASE WHEN :final THEN 'failed' ELSE 'waiting' END, error = :error,
                            next_attempt_at = clock_timestamp() + make_interval(secs => :wait_seconds)
    WHERE id = :id AND attempts = :attempts AND status = 'waiting'
    """
)


def note_sent(connection: Connection, alert: Alert) -> None:
    """Record that the receiver has accepted an alert."""
    connection.execute(_SENT, {"id": alert.id})


def note_failed(connection: Connection, alert: Alert, error: str, *, final: bool) -> None:
    """Record that a sending failed. It is retried with exponential backoff; `final`: it is given up."""
    values = {
        "id": alert.id,
        "attempts": alert.attempts,
        "error": error[:500],
        "final": final,
        "wait_seconds": min(MAX_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(alert.attempts - 1, 20)),
    }
    connection.execute(_FAILED, values)


def list_alerts(connection: Connection, *, statuses: Sequence[str] = (), limit: int = 50) -> list[Alert]:
    """Return alerts, newest first, at most `limit`. `statuses` empty: all."""
    condition = "WHERE status = ANY (:statuses)" if statuses else ""
    query = text(f"SELECT {_COLUMNS} FROM trueup.alert {condition} ORDER BY id DESC LIMIT :limit")
    values = {"limit": limit} | ({"statuses": list(statuses)} if statuses else {})
    return [Alert(**row) for row in connection.execute(query, values).mappings()]
