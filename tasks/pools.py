"""Refuse worker pools in which metered tasks can't be told apart or be interrupted safely."""

from typing import Any

from celery.signals import worker_init

# Greenlets of eventlet or gevent share one process and one thread. While PostgreSQL's driver waits, none of them runs,
# so that heartbeats stop and leases end; and no time limit ends a single task.
_REFUSED = {"celery.concurrency.eventlet": "eventlet", "celery.concurrency.gevent": "gevent"}


@worker_init.connect(weak=False, dispatch_uid="trueup-pools")
def _refuse_greenlets(sender: Any = None, **_: Any) -> None:
    pool = _REFUSED.get(getattr(getattr(sender, "pool_cls", None), "__module__", ""))
    if pool is not None:
        # Celery logs any other exception of a signal's receiver, and goes on.
        raise SystemExit(
            f"This worker has metered tasks, and its pool is {pool}. Nothing was started, because metered tasks lose "
            "their holds in it. Start the worker with --pool prefork, threads or solo. Keep your other tasks in a "
            f"worker of their own that does not import trueup's tasks, if they need {pool}."
        )
