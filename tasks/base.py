"""The metered base task: gate first, then the body with a model client bound to its hold, then the rest given back."""

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
from trueup.settings.settings import get_settings
from trueup.tasks.arguments import USER_ARGUMENT, ArgumentParser
from trueup.tasks.requests import owner_name
from trueup.tasks.requeue import leave_to_later_attempt, requeue, retry_provider, waits_of

logger = logging.getLogger(__name__)

Estimator = Callable[[Mapping[str, Any]], int | None]
Estimate = int | Estimator
OnDenied = Literal["raise", "return"]

# On the request of an outer task: how many metered tasks its body has called directly.
CALLS_ATTRIBUTE = "trueup_direct_calls"

# A task that waits for another attempt's lease asks again this long after its end.
ASK_AGAIN_SECONDS = 0.5


class MeteredTask(Task):
    """Base of every task that may spend tokens.

    The gate sits in `__call__`, which all ways to call a task pass through: worker, eager, direct, map and chunks.
    `run` bypasses it, and finds a model client that refuses to spend.
    """

    abstract = True
    Request = "trueup.tasks.requests:MeteredRequest"
    feature_name: ClassVar[str]
    section: ClassVar[str]
    estimated_tokens: ClassVar[Estimate]
    on_denied: ClassVar[OnDenied] = "raise"
    parser: ClassVar[ArgumentParser]

    throws = (TokensDenied,)
    dont_autoretry_for = (TokensDenied,)
    acks_late = True
    # A lost pool child is retried, at most max_retries times; a rejected message would come back for ever.
    retry_on_worker_lost = True
    # Celery's 180 s would keep a hold idle for as long.
    default_retry_delay = 2

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        # A task called directly has no request of its own: none at all, or that of the metered task that calls it.
        outer = running_hold()
        if request.called_directly or (outer is not None and outer.task_id == request.id):
            with self._own_request(args, kwargs):
                return self._call(args, kwargs)
        return self._call(args, kwargs)

    @contextmanager
    def _own_request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Give a direct call an id of its own.

        Inside another task (`map`, `starmap`, `chunks`, or a body that calls this one) it follows from that task's id
        and how many such calls came before: when that task is redelivered, this call finds what it has paid for.
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
            # The attempt at work tells how the task stands: a "retry" told of this one might come over its result.
            raise (Ignore(str(error)) if isinstance(waiting, Retry) else waiting) from error
        except (ServiceUnavailableError, GateClosedError) as error:
            raise requeue(self, error) from error

    def _run_held(self, arguments: dict[str, Any], hold: Hold) -> Any:
        try:
            return self._run(arguments)
        except HoldExhaustedError:
            if hold.replay:
                # The work was done, and its answers were not kept: the result of the earlier attempt stands.
                raise Ignore(f"task {hold.task_id} was done by an earlier delivery") from None
            raise
        except HoldOvertakenError as error:
            if self.request.called_directly:
                raise
            if retrying(lambda connection: has_later_attempt(connection, hold)):
                raise leave_to_later_attempt(error) from error
            # Its hold's time ran out and nobody went on: back to the gate, with what it has paid for.
            raise requeue(self, error, ASK_AGAIN_SECONDS) from error

    def _run(self, arguments: dict[str, Any]) -> Any:
        try:
            return self.run(**arguments)
        except TrueupError as error:
            if getattr(error, "retryable", False) and not self.request.called_directly:
                raise retry_provider(self, error) from error
            raise

    def _estimate(self, arguments: dict[str, Any]) -> int | None:
        """Return the tokens to hold; None when this call uses no AI, so that it needs none and can spend none."""
        estimate = self.estimated_tokens
        # One base type for both would be a lie: the class attribute is a count, or a static function of one argument.
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
        if hold.passed is not None:
            logger.warning(
                "%s runs although it would be denied (%s): its gate is not enforced; task %s, user %s, %d tokens",
                self.feature_name,
                hold.passed,
                hold.task_id,
                hold.user_id,
                tokens,
            )
        return hold

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Retry as Celery does, unless a later attempt has the hold: it must not lose it to an earlier one."""
        hold = running_hold()
        if hold is not None and retrying(lambda connection: has_later_attempt(connection, hold)):
            raise leave_to_later_attempt(HoldOvertakenError(hold.task_id, hold.attempt))
        return super().retry(*args, **kwargs)


def _json_safe(result: Any) -> Any:
    return result.model_dump(mode="json") if isinstance(result, BaseModel) else result


@contextmanager
def _closing(hold: Hold) -> Iterator[None]:
    """Give back what the body leaves, however it ends: also on SystemExit and a soft time limit.

    A retry that comes soon keeps its hold: it is not to lose its place to others. If closing fails, the hold's time
    runs out and it is given back then: the work itself is done.
    """
    completed = kept = False
    try:
        yield
        completed = True
    except Retry as retry:
        kept = _seconds_until(retry) <= get_settings().keep_hold_seconds
        raise
    finally:
        if not kept:
            _close(hold, completed=completed)


def _close(hold: Hold, *, completed: bool) -> None:
    try:
        retrying(lambda connection: close_hold(connection, hold, completed=completed))
    except TrueupError:
        logger.warning(
            "hold of task %s (user %s) not closed: it expires at %s", hold.task_id, hold.user_id, hold.expires_at
        )


def _seconds_until(retry: Retry) -> float:
    """Return when the retry comes; Celery gives a countdown or a moment."""
    if isinstance(retry.when, datetime):
        return (retry.when - datetime.now(retry.when.tzinfo)).total_seconds()
    return float(retry.when or 0)
