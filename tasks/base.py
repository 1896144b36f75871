"""The metered base task: it passes the gate, runs the body with a model client bound to a hold, and closes the hold."""

import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, ClassVar, Literal, cast

from celery import Task
from celery._state import get_current_task
from celery.exceptions import Ignore, Retry
from pydantic import BaseModel

from trueup.database.retry import retrying
from trueup.errors import (
    GateClosedError,
    HoldBusyError,
    HoldExhaustedError,
    HoldOvertakenError,
    ServiceUnavailableError,
    TokensDenied,
    TrueupError,
)
from trueup.gate.holds import Hold, close_hold, has_later_attempt, open_hold
from trueup.llm.metering import running_hold, spending_from
from trueup.llm.model import Provider
from trueup.settings.settings import get_settings
from trueup.tasks.arguments import USER_ARGUMENT, ArgumentParser
from trueup.tasks.body import check_result
from trueup.tasks.requests import owner_name
from trueup.tasks.requeue import leave_to_later_attempt, requeue, retry_provider, waits_of

logger = logging.getLogger(__name__)

Estimator = Callable[[Mapping[str, Any]], int | None]
Estimate = int | Estimator
OnDenied = Literal["raise", "return"]

# Count, on the request of an outer task, of the metered tasks that its body has called directly.
CALLS_ATTRIBUTE = "trueup_direct_calls"

# What `celery.contrib.django.task` adds to the tasks of an application in a Django project.
ON_COMMIT = ("delay_on_commit", "apply_async_on_commit")

# The hold that a retry keeps, on the exception that asks for the retry.
KEPT_HOLD = "trueup_kept_hold"

# A duplicate asks the gate again this long after the other attempt's lease ends.
ASK_AGAIN_SECONDS = 0.5


class MeteredTask(Task):
    """Base of every task that may spend tokens.

    The gate is in `__call__`, because every way to call a task goes through it: worker, eager, direct, map and chunks.
    A call of `run` bypasses the gate; there the model client finds no hold and refuses to spend.
    """

    abstract = True
    Request = "trueup.tasks.requests:MeteredRequest"
    feature_name: ClassVar[str]
    section: ClassVar[str]
    estimated_tokens: ClassVar[Estimate]
    on_denied: ClassVar[OnDenied] = "raise"
    parser: ClassVar[ArgumentParser]
    provider: ClassVar["staticmethod[[], Provider]"]

    throws = (TokensDenied,)
    dont_autoretry_for = (TokensDenied,)
    acks_late = True
    # Celery retries a lost pool process at most max_retries times; a rejected message would be redelivered for ever.
    retry_on_worker_lost = True
    # Seconds. Celery's default of 180 would keep a hold idle for that long.
    default_retry_delay = 2

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        # A direct call has no request of its own: there is none, or the request is the calling metered task's.
        outer = running_hold()
        if request.called_directly or (outer is not None and outer.task_id == request.id):
            with self._own_request(args, kwargs):
                return self._call(args, kwargs)
        return self._call(args, kwargs)

    @contextmanager
    def _own_request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Give a direct call a task id of its own.

        Inside another task (`map`, `starmap`, `chunks`, or a body that calls this one) the id is derived from the outer
        task's id and the count of direct calls before this one. After a redelivery of the outer task, the same call has
        the same id, so its paid calls are replayed.
        """
        outer = get_current_task()
        task_id, retries = str(uuid.uuid4()), 0
        if outer is not None and outer.request.id:
            place = getattr(outer.request, CALLS_ATTRIBUTE, 0) + 1
            setattr(outer.request, CALLS_ATTRIBUTE, place)
            task_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{outer.request.id}/{self.name}/{place}"))
            retries = outer.request.retries
        self.push_request(id=task_id, args=args, kwargs=kwargs, retries=retries, called_directly=True)
        try:
            yield
        finally:
            self.pop_request()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            arguments = self.parser.parse(args, kwargs)
            tokens = self._estimate(arguments)
            if tokens is None:
                return _json_safe(self._run(arguments))
            # Before the gate: without a provider the task can't work, and must not hold tokens that others could use.
            self.provider()
            hold = self._open_hold(arguments, tokens)
            with _closing(hold), spending_from(hold):
                return _json_safe(self._run_held(arguments, hold))
        except TokensDenied as denied:
            if self.on_denied == "return":
                return denied.payload
            raise
        except HoldBusyError as error:
            if error.redundant and not self.request.called_directly:
                raise Ignore(str(error)) from error
            waiting = requeue(self, error, error.seconds + ASK_AGAIN_SECONDS, waits=error.waits)
            # The running attempt reports the task's state: a "retry" of this duplicate could overwrite its result.
            raise (Ignore(str(error)) if isinstance(waiting, Retry) else waiting) from error
        except (ServiceUnavailableError, GateClosedError) as error:
            raise requeue(self, error) from error

    def _run_held(self, arguments: dict[str, Any], hold: Hold) -> Any:
        try:
            return self._run(arguments)
        except HoldExhaustedError:
            if hold.replay:
                # An earlier delivery did the work but its answers were not stored, so nothing can be replayed. Keep the
                # result of that delivery.
                raise Ignore(f"task {hold.task_id} was already completed by an earlier delivery") from None
            raise
        except HoldOvertakenError as error:
            if self.request.called_directly:
                raise
            if retrying(lambda connection: has_later_attempt(connection, hold)):
                raise leave_to_later_attempt(error) from error
            # The hold expired and no later attempt took over. Requeue the task; calls already paid for are replayed.
            raise requeue(self, error, ASK_AGAIN_SECONDS) from error

    def _run(self, arguments: dict[str, Any]) -> Any:
        try:
            return check_result(self.run(**arguments), self.name)
        except TrueupError as error:
            if getattr(error, "retryable", False) and not self.request.called_directly:
                raise retry_provider(self, error) from error
            raise

    def _estimate(self, arguments: dict[str, Any]) -> int | None:
        """Return the tokens to hold; None for a call that uses no AI: it holds no tokens and can't spend any."""
        estimate = self.estimated_tokens
        # Cast, because mypy takes a callable class attribute for a method; `metered_task` stores a static function.
        return cast("Estimator", estimate)(arguments) if callable(estimate) else estimate

    def _open_hold(self, arguments: dict[str, Any], tokens: int) -> Hold:
        settings = get_settings()
        hold = retrying(
            lambda connection: open_hold(
                connection,
                user_id=arguments[USER_ARGUMENT],
                task_id=self.request.id,
                retries=self.request.retries,
                waits=waits_of(self),
                feature_name=self.feature_name,
                section=self.section,
                estimated_tokens=tokens,
                owner=owner_name(self.request.hostname or socket.gethostname(), os.getpid()),
                lease_seconds=settings.lease_seconds,
                ttl_seconds=settings.hold_ttl_seconds,
            )
        )
        if hold.overridden is not None:
            logger.warning(
                "task admitted by a gate that is not enforced feature=%r denial=%s task=%s user=%s tokens=%d",
                self.feature_name,
                hold.overridden,
                hold.task_id,
                hold.user_id,
                tokens,
            )
        return hold

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task here, as Celery does. If that raises the retry instead of running it, close the kept hold."""
        try:
            return super().apply(*args, **kwargs)
        except Retry as retry:
            hold = getattr(retry, KEPT_HOLD, None)
            if hold is not None:
                _close(hold, completed=False)
            raise

    @classmethod
    def bind(cls, app: Any) -> Any:
        """Bind the task to an application, with the methods that its Django fixup gives to all tasks."""
        for name in ON_COMMIT:
            if hasattr(app.Task, name) and not hasattr(cls, name):
                setattr(cls, name, getattr(app.Task, name))
        return super().bind(app)

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Retry as Celery does, unless a later attempt has the hold: a retry would take the hold from it."""
        hold = running_hold()
        if hold is not None and retrying(lambda connection: has_later_attempt(connection, hold)):
            raise leave_to_later_attempt(HoldOvertakenError(hold.task_id, hold.attempt))
        return super().retry(*args, **kwargs)


def _json_safe(result: Any) -> Any:
    return result.model_dump(mode="json") if isinstance(result, BaseModel) else result


@contextmanager
def _closing(hold: Hold) -> Iterator[None]:
    """Close the hold and so release its unspent tokens, however the body ends: also on SystemExit or a soft time limit.

    A retry within `keep_hold_seconds` keeps its hold, so that other tasks do not take its tokens. If closing fails, the
    task still succeeds, because its work is done; the hold expires later.
    """
    completed = kept = False
    try:
        yield
        completed = True
    except Retry as retry:
        kept = _seconds_until(retry) <= get_settings().keep_hold_seconds
        if kept:
            setattr(retry, KEPT_HOLD, hold)
        raise
    finally:
        if not kept:
            _close(hold, completed=completed)


def _close(hold: Hold, *, completed: bool) -> None:
    try:
        retrying(lambda connection: close_hold(connection, hold, completed=completed))
    except TrueupError:
        logger.warning(
            "hold not closed, it will expire task=%s user=%s expires_at=%s",
            hold.task_id,
            hold.user_id,
            hold.expires_at,
        )


def _seconds_until(retry: Retry) -> float:
    """Return the seconds until a retry. Celery states a countdown or a point in time."""
    if isinstance(retry.when, datetime):
        return (retry.when - datetime.now(retry.when.tzinfo)).total_seconds()
    return float(retry.when or 0)
