"""Celery's configuration and beat's schedule, from trueup's settings."""

from datetime import timedelta
from typing import Any

from trueup.errors import SettingsError
from trueup.extras import require_extra
from trueup.settings.broker import is_sentinel
from trueup.settings.settings import PREFIX, Settings, broker_url, result_backend_url
from trueup.tasks.queues import AI_QUEUE, RECONCILE_QUEUE
from trueup.tasks.reconcile import SWEEP_INTERVAL_SECONDS

SOFT_LIMIT_MARGIN_SECONDS = 60
PRUNE_INTERVAL_SECONDS = 3600
ALERT_INTERVAL_SECONDS = 60
DELIVER_INTERVAL_SECONDS = 30
# Beat requests a deep pass this often. The pass starts if its period has had none, so that a busy worker skips none.
DEEP_ASKED_SECONDS = 600
# A client waits this long for Redis.
ANSWER_SECONDS = 3.0


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings for a worker. Raises `SettingsError` without a broker."""
    hard_limit = settings.task_time_limit_seconds
    sentinel = _sentinel(settings)
    return {
        "broker_url": broker_url(settings),
        "result_backend": result_backend_url(settings),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            **sentinel,
            # A task or countdown that takes longer is delivered again while the first delivery still runs.
            "visibility_timeout": settings.visibility_timeout_seconds,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            # With the default, a worker that dies while it restores messages blocks redelivery for five minutes.
            "unacked_mutex_expire": 10,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
        "result_backend_transport_options": sentinel,
        "redis_socket_timeout": 30,
        "redis_socket_connect_timeout": 5,
        "redis_backend_health_check_interval": 25,
        "result_backend_always_retry": True,
        "result_extended": True,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "enable_utc": True,
        "timezone": "UTC",
        # At-least-once delivery: a task is acknowledged when it has ended, and the gate makes a redelivery harmless.
        "task_acks_late": True,
        "task_track_started": True,
        "task_time_limit": hard_limit,
        "task_soft_time_limit": max(1, hard_limit - min(SOFT_LIMIT_MARGIN_SECONDS, hard_limit // 10 + 1)),
        "task_default_queue": AI_QUEUE,
        "task_routes": {
            "trueup.reconcile_*": {"queue": RECONCILE_QUEUE},
            "trueup.prune_*": {"queue": RECONCILE_QUEUE},
            "trueup.settle_owed_charges": {"queue": RECONCILE_QUEUE},
            "trueup.deliver_charge_events": {"queue": RECONCILE_QUEUE},
            "trueup.sweep_runs": {"queue": RECONCILE_QUEUE},
            "trueup.expire_holds": {"queue": RECONCILE_QUEUE},
            "trueup.check_alerts": {"queue": RECONCILE_QUEUE},
        },
        # Beyond the usual limit, such a task may run one long statement.
        "task_annotations": {
            task: {
                "time_limit": hard_limit + settings.reconcile_scan_timeout_seconds,
                "soft_time_limit": hard_limit + settings.reconcile_scan_timeout_seconds - 1,
            }
            for task in ("trueup.reconcile_counters", "trueup.reconcile_shard")
        },
        "worker_concurrency": settings.worker_concurrency,
        "worker_prefetch_multiplier": 1,
        "worker_max_tasks_per_child": 1000,
        "worker_soft_shutdown_timeout": 30,
        "worker_enable_soft_shutdown_on_idle": True,
        # True would kill a task between a provider's answer and its charge.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_hijack_root_logger": False,
        "beat_schedule": beat_schedule(settings),
        **_redbeat(settings),
    }


def client_config(settings: Settings) -> dict[str, Any]:
    """Return the configuration of a client that sends tasks. Without retries it reports at once that Redis is down."""
    config = celery_config(settings)
    return config | {
        "broker_transport_options": config["broker_transport_options"]
        | {"socket_timeout": ANSWER_SECONDS, "socket_connect_timeout": ANSWER_SECONDS},
        "redis_socket_timeout": ANSWER_SECONDS,
        "redis_socket_connect_timeout": ANSWER_SECONDS,
        "result_backend_always_retry": False,
        "result_backend_transport_options": config["result_backend_transport_options"]
        | {"retry_policy": {"max_retries": 0}},
        "task_publish_retry": False,
    }


def beat_schedule(settings: Settings) -> dict[str, Any]:
    """Return beat's schedule. A message expires before the next one is due, so that messages do not pile up."""
    deep = min(DEEP_ASKED_SECONDS, settings.reconcile_deep_interval_seconds)
    return {
        "reconcile-counters": _every(settings.reconcile_interval_seconds, "trueup.reconcile_counters", scheduled=True),
        **({"reconcile-deep": _every(deep, "trueup.reconcile_counters", scheduled=True, deep=True)} if deep else {}),
        "sweep-runs": _every(SWEEP_INTERVAL_SECONDS, "trueup.sweep_runs"),
        "expire-holds": _every(settings.expire_interval_seconds, "trueup.expire_holds"),
        "settle-owed-charges": _every(settings.expire_interval_seconds, "trueup.settle_owed_charges"),
        **(
            {"deliver-charge-events": _every(DELIVER_INTERVAL_SECONDS, "trueup.deliver_charge_events")}
            if settings.on_charge
            else {}
        ),
        "prune-answers": _every(PRUNE_INTERVAL_SECONDS, "trueup.prune_answers"),
        "prune-journal": _every(PRUNE_INTERVAL_SECONDS, "trueup.prune_journal"),
        "prune-requests": _every(PRUNE_INTERVAL_SECONDS, "trueup.prune_requests"),
        "prune-observed-denials": _every(PRUNE_INTERVAL_SECONDS, "trueup.prune_observed_denials"),
        **({"check-alerts": _every(ALERT_INTERVAL_SECONDS, "trueup.check_alerts")} if settings.alerts.channels else {}),
    }


def _sentinel(settings: Settings) -> dict[str, Any]:
    """Return the options with which Celery asks Sentinels for the master. Raises `SettingsError` without its name."""
    if not any(map(is_sentinel, (broker_url(settings), result_backend_url(settings)))):
        return {}
    if settings.sentinel_master is None:
        raise SettingsError(
            f"A URL names Sentinels, and {PREFIX}SENTINEL_MASTER is not set. Nothing was started. Set it to the name "
            "that the Sentinels monitor: `redis-cli -p 26379 sentinel masters` shows it."
        )
    return {"master_name": settings.sentinel_master}


def _redbeat(settings: Settings) -> dict[str, Any]:
    """Return the settings of celery-redbeat. Of several beats, only the holder of a lock in Redis sends.

    Raises `MissingExtraError` when celery-redbeat is not installed, `SettingsError` for a broker it can't use.
    """
    if settings.beat_scheduler != "redbeat":
        return {}
    require_extra("redbeat", "TRUEUP_BEAT_SCHEDULER=redbeat", otherwise="unset the setting: one beat needs no lock")
    url = broker_url(settings)
    if is_sentinel(url):
        raise SettingsError(
            f"{PREFIX}BEAT_SCHEDULER=redbeat can't follow Sentinels. Nothing was started. Unset it and run one beat; "
            "a second beat does no harm, because each scheduled run exists once."
        )
    socket = url.removeprefix("redis+socket://")
    return {
        "beat_scheduler": "redbeat.RedBeatScheduler",
        "redbeat_redis_url": url if socket == url else f"unix://{socket.replace('virtual_host=', 'db=')}",
        "redbeat_redis_options": {"socket_timeout": 30, "socket_connect_timeout": 5, "retry_period": 60},
        "redbeat_key_prefix": "trueup-beat:",
        "redbeat_lock_timeout": settings.beat_lock_seconds,
        # A beat renews or requests the lock in each loop.
        "beat_max_loop_interval": max(1, settings.beat_lock_seconds // 5),
    }


def _every(seconds: int, task: str, **kwargs: bool) -> dict[str, Any]:
    return {
        "task": task,
        "kwargs": kwargs,
        "schedule": timedelta(seconds=seconds),
        "options": {"expires": max(1, seconds - 1), "queue": RECONCILE_QUEUE},
    }
