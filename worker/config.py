"""Celery's configuration, made from trueup's settings. A table; the reasons stand beside the lines."""

from datetime import timedelta
from typing import Any

from billing.settings import Settings, broker_url, result_backend_url

AI_QUEUE = "ai"
RECONCILE_QUEUE = "reconcile"

SOFT_LIMIT_MARGIN_SECONDS = 60
PRUNE_INTERVAL_SECONDS = 3600


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings. Raises `SettingsError` when no broker is known."""
    hard_limit = settings.task_time_limit_seconds
    return {
        "broker_url": broker_url(settings),
        "result_backend": result_backend_url(settings),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            # A body or countdown longer than this runs again while the first still runs: keep time limits below it.
            "visibility_timeout": settings.visibility_timeout_seconds,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            # A worker killed while it restores would else keep the others from it for five minutes.
            "unacked_mutex_expire": 10,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
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
        # At least once: a task is acknowledged when it is done, and the gate makes repeating it harmless.
        "task_acks_late": True,
        "task_track_started": True,
        "task_time_limit": hard_limit,
        "task_soft_time_limit": max(1, hard_limit - min(SOFT_LIMIT_MARGIN_SECONDS, hard_limit // 10 + 1)),
        "task_default_queue": AI_QUEUE,
        "task_routes": {
            "tasks.reconcile_counters": {"queue": RECONCILE_QUEUE},
            "tasks.expire_holds": {"queue": RECONCILE_QUEUE},
            "tasks.prune_answers": {"queue": RECONCILE_QUEUE},
        },
        "worker_concurrency": settings.worker_concurrency,
        "worker_prefetch_multiplier": 1,
        "worker_max_tasks_per_child": 1000,
        "worker_soft_shutdown_timeout": 30,
        "worker_enable_soft_shutdown_on_idle": True,
        # True would kill bodies between a provider's answer and its charge.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_hijack_root_logger": False,
        "beat_schedule": beat_schedule(settings),
    }


def beat_schedule(settings: Settings) -> dict[str, Any]:
    """Return what beat sends. An entry that could not run before the next is due expires, so that none pile up."""
    return {
        "reconcile-counters": _every(settings.reconcile_interval_seconds, "tasks.reconcile_counters"),
        "expire-holds": _every(settings.expire_interval_seconds, "tasks.expire_holds"),
        "prune-answers": _every(PRUNE_INTERVAL_SECONDS, "tasks.prune_answers"),
    }


def _every(seconds: int, task: str) -> dict[str, Any]:
    return {
        "task": task,
        "schedule": timedelta(seconds=seconds),
        "options": {"expires": max(1, seconds - 1), "queue": RECONCILE_QUEUE},
    }
