"""Charge events: trueup calls the host's own function after each charge has committed, at least once.

An event is written by the statement that records its charge, so one exists exactly if the charge committed. The process
that charged delivers it from a thread. A function that fails is called again by the upkeep task, after a growing pause.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from functools import lru_cache
from importlib import import_module
from inspect import iscoroutinefunction
from typing import Any

from sqlalchemy import Connection, Row, TextClause, text
from sqlalchemy.exc import DBAPIError

from trueup.accounts.user_ids import UserId
from trueup.database.retry import retrying
from trueup.errors import SettingsError, TrueupError
from trueup.settings.settings import get_settings

logger = logging.getLogger(__name__)

# One delivery ends after this time. The next one continues.
DELIVERY_SECONDS = 60
_MAX_ERROR = 500


@dataclass(frozen=True, kw_only=True)
class ChargeEvent:
    """A committed charge, as the function of `TRUEUP_ON_CHARGE` gets it. Token figures are counts.

    `key`: the charge's idempotency key, the same in each call for this charge. `task_id`, `feature_name` None: the
    host reported the usage with `track_ai_usage` or `ai_usage`. `prompt_tokens`, `completion_tokens`: as billed by the
    provider. `total_tokens`: what counts against the budget. `classes`: the billed tokens by class, such as
    cached_input; None: not known. `charged_at`: when the tokens were used, in UTC.
    """

    key: str
    user_id: UserId
    task_id: str | None
    feature_name: str | None
    section: str
    model_name: str
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    classes: Mapping[str, int] | None
    charged_at: datetime


def with_event(record: str, *, is_report: bool = False) -> TextClause:
    """Return a statement that records a charge, extended to write its event too if it records one.

    `record`: selects a row with the columns `at` and `recorded`. Its parameters `log_id`, `user_id`, `task_id`,
    `section`, `model_name`, `classes` and the token counts are the event's. `is_report`: without a task, and the
    parameter `created_at` has the time.
    """
    task, feature = ("NULL", "NULL") if is_report else (":task_id", ":feature_name")
    classes, used_at = ("NULL", "CAST(:created_at AS timestamptz)") if is_report else (":classes", "NULL")
    return text(
        f"""
        WITH charged AS MATERIALIZED ({record}), event AS (
            INSERT INTO trueup.charge_event (user_id, key, task_id, feature_name, section, model_name, prompt_tokens,
                                             completion_tokens, total_tokens, classes, charged_at, due_at)
            SELECT :user_id, :log_id, {task}, {feature}, :section, :model_name, :prompt_tokens,
                   :completion_tokens, :total_tokens, CAST({classes} AS jsonb), least({used_at}, charged.at), charged.at
            FROM charged WHERE charged.recorded
        )
        SELECT * FROM charged
        """
    )


# A claimed event is due again after this pause, so that it is delivered again if the process dies meanwhile.
_CLAIM = text(
    """
    WITH due AS MATERIALIZED (
        SELECT user_id, key FROM trueup.charge_event
        WHERE due_at <= coalesce(CAST(:now AS timestamptz), clock_timestamp())
        ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    UPDATE trueup.charge_event e
    SET tries = e.tries + 1,
        due_at = coalesce(CAST(:now AS timestamptz), clock_timestamp())
                 + least(interval '30 seconds' * power(2, least(e.tries, 10)), interval '1 hour')
    FROM due WHERE e.user_id = due.user_id AND e.key = due.key RETURNING e.*
    """
)
_DELIVERED = text("DELETE FROM trueup.charge_event WHERE user_id = :user_id AND key = :key")
_FAILED = text("UPDATE trueup.charge_event SET last_error = :error WHERE user_id = :user_id AND key = :key")


def deliver_charge_events(*, now: datetime | None = None) -> tuple[int, int]:
    """Call the host's function for each event that is due, for about `DELIVERY_SECONDS` at most.

    `now` None: the database's clock. Returns how many calls succeeded, and how many failed: these are tried again after
    30 s, then twice as long after each failure, at most an hour. Does nothing without `TRUEUP_ON_CHARGE`.
    """
    path = get_settings().on_charge
    delivered = failed = 0
    deadline = time.monotonic() + DELIVERY_SECONDS
    while path is not None and time.monotonic() < deadline:
        row = retrying(lambda connection: connection.execute(_CLAIM, {"now": now}).one_or_none())
        if row is None:
            break
        if _deliver(path, row):
            delivered += 1
        else:
            failed += 1
    return delivered, failed


def _deliver(path: str, row: Row[Any]) -> bool:
    """Call the host's function with the event and delete the event; or keep it with the error."""
    place = {"user_id": row.user_id, "key": row.key}
    try:
        event = ChargeEvent(**{field.name: getattr(row, field.name) for field in fields(ChargeEvent)})
        load_callback(path)(event)
    except Exception as error:
        logger.exception(
            "on_charge failed, it is called again key=%s user=%s tries=%d", row.key, row.user_id, row.tries
        )
        said = f"{type(error).__name__}: {error}".replace("\x00", "")[:_MAX_ERROR]
        values = place | {"error": said.encode(errors="replace").decode()}
        retrying(lambda connection: connection.execute(_FAILED, values))
        return False
    retrying(lambda connection: connection.execute(_DELIVERED, place))
    return True


@lru_cache(maxsize=1)
def load_callback(path: str) -> Callable[[ChargeEvent], object]:
    """Return the function at a dotted path. Raises `SettingsError` if trueup can call no function there."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"on_charge (TRUEUP_ON_CHARGE): {path} can't be imported ({error}). Correct it.") from error
    if not callable(function) or iscoroutinefunction(function):
        raise SettingsError(f"on_charge (TRUEUP_ON_CHARGE): {path} is no plain function. Give a def, not an async def.")
    return function  # type: ignore[no-any-return]


_LAST_FAILURE = text(
    "SELECT last_error FROM trueup.charge_event WHERE last_error IS NOT NULL ORDER BY charged_at LIMIT 1"
)


def last_failure(connection: Connection) -> str | None:
    """Return the error of the oldest event whose delivery failed; None: no event waits after a failure."""
    error: str | None = connection.scalar(_LAST_FAILURE)
    return error


class _Courier:
    """Delivers events from a thread, which ends when none is due.

    Not in the thread that charged: a function that hangs must not stop the call, and what it writes must not be in a
    transaction of the task's body, which may roll it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_running = False
        self._is_asked = False

    def ask(self) -> None:
        """Have the due events delivered soon. Raises nothing."""
        with self._lock:
            self._is_asked = True
            if self._is_running:
                return
            self._is_running = True
        try:
            threading.Thread(target=self._run, name="trueup-charge-events", daemon=True).start()
        except RuntimeError as error:  # the process ends, or has too many threads
            self._stopped()
            logger.warning("charge events not delivered now, the upkeep task will do it error=%s", error)

    def _run(self) -> None:
        try:
            while self._takes_over():
                _deliver_or_leave()
        except BaseException:
            self._stopped()
            raise
        finally:
            _close_django_connections()

    def _stopped(self) -> None:
        with self._lock:
            self._is_running = False

    def _takes_over(self) -> bool:
        with self._lock:
            asked, self._is_asked = self._is_asked, False
            self._is_running = asked
            return asked


def _deliver_or_leave() -> None:
    try:
        deliver_charge_events()
    except (TrueupError, DBAPIError) as error:
        logger.warning("charge events not delivered now, the upkeep task will do it error=%s", error)


def _close_django_connections() -> None:
    """Close this thread's connections of Django, which closes none at the end of a thread."""
    django = sys.modules.get("django.db")
    if django is not None:
        django.connections.close_all()


_courier = _Courier()


def deliver_soon() -> None:
    """Have this process deliver the events that are due, without waiting for it. Call it after the commit."""
    if get_settings().on_charge is not None:
        _courier.ask()


def _begin_anew() -> None:
    """Forget the parent's thread: a forked process does not have it."""
    global _courier
    _courier = _Courier()


os.register_at_fork(after_in_child=_begin_anew)
