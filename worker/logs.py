"""Logs of worker and beat: one line for each record, with the task's name and id, at the level of the settings."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from celery import current_task
from celery.app import log, trace
from celery.signals import setup_logging, worker_ready

from trueup.extras import missing_modules
from trueup.settings.settings import get_settings

logger = logging.getLogger(__name__)

FORMAT = "%(asctime)sZ %(levelname)s %(name)s%(task)s: %(message)s"
# At INFO these log a line for each HTTP request or migration.
QUIET_LOGGERS = (
    *("httpx", "httpx2", "httpcore", "httpcore2", "openai", "anthropic", "google_genai"),
    "alembic.runtime.migration",
)


class Formatter(logging.Formatter):
    """Formats times in UTC, and adds the name and id of the current task."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        task = current_task
        record.task = f" {task.name}[{task.request.id}]" if task and task.request.id else ""
        return super().format(record)


class WithoutResults(logging.Filter):
    """Leaves the results of tasks out of Celery's lines: they are users' texts, which a log must not keep."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, Mapping) and "return_value" in record.args:
            record.args = {**record.args, "return_value": "(result not logged)"}
        return True


# One object: a logger has a filter once, however often it is added.
_WITHOUT_RESULTS = WithoutResults()


class Logging(log.Logging):
    """Logging of trueup's own worker and beat. A host's application in the same process keeps Celery's logging."""

    def setup_logging_subsystem(self, *args: Any, **options: Any) -> Any:
        """Set logging up as Celery does, with trueup's handler. A worker logs a warning if it lacks the AI tasks."""
        setup_logging.connect(configure, weak=False, dispatch_uid=__name__)
        worker_ready.connect(_warn_of_missing_tasks, weak=False, dispatch_uid=__name__)
        return super().setup_logging_subsystem(*args, **options)


def _warn_of_missing_tasks(**_signal: Any) -> None:
    missing = missing_modules("features")
    if missing:
        logger.warning(
            "Without the extra [features] no AI task of trueup's own is registered in this worker. Install it: "
            "pip install 'trueup[features]' missing_modules=%s",
            ",".join(missing),
        )


def configure(**_signal: Any) -> None:
    """Write all records to standard error. TRUEUP_LOG_LEVEL sets the level; Celery's `-l` has no effect."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(FORMAT))
    logging.basicConfig(level=get_settings().log_level, handlers=[handler], force=True)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(trace.__name__).addFilter(_WITHOUT_RESULTS)
