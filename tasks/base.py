"""The metered base task: it passes the gate, runs the body with a model client bound to a hold, and closes the hold."""

import logging
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, ClassVar, Literal, cast

from celery import Task
from celery._state import get_current_task
from celery.exceptions import Ignore, Reject, Retry
from celery.states import READY_STATES, STARTED, SUCCESS
from pydantic import BaseModel

from trueup.database.retry import retrying
from trueup.errors import (
    GateClosedError,
    HoldBusyError,
    HoldExhaustedError,
    HoldLifetimeError,
    HoldOvertakenError,
    InvalidInputError,
    OutOfMemoryError,
    ResultNotKeptError,
    ServiceUnavailableError,
    TaskIdReusedError,
    TokensDenied,
    TrueupError,
    hidden_in,
)
from trueup.gate.heartbeat import keeping
from trueup.gate.holds import CallNumbers, Hold, close_hold, count_lost, has_later_attempt, open_hold
from trueup.llm.model import Provider
from trueup.llm.running import running_hold, spending_from
from trueup.settings.settings import get_settings
from trueup.tasks.applications import require_broker
from trueup.tasks.arguments import USER_ARGUMENT, ArgumentParser
from trueup.tasks.body import check_result
from trueup.tasks.identity import (
    asks_for_new_answers,
    canonical_defaults,
    identity_of,
    is_random_id,
    request_fingerprint,
    retry_headers,
)
from trueup.tasks.republish import confirmed, is_republished
from trueup.tasks.requests import owner_name
from trueup.tasks.requeue import leave_to_later_attempt, reject_after_pause, requeue, retry_provider, waits_of

logger = logging.getLogger(__name__)

Estimator = Callable[[Mapping[str, Any]], int | None]
Estimate = int | Estimator
OnDenied = Literal["raise", "return"]
Replay = Literal["redelivery", "always"]

# On the request of an outer task that is not metered: the numbers of the metered tasks that it has called directly.
CALLS_ATTRIBUTE = "trueup_direct_calls"

# What `celery.contrib.django.task` adds to the tasks of an application in a Django project.
ON_COMMIT = ("delay_on_commit", "apply_async_on_commit")

# The hold that a retry keeps, on the exception that asks for the retry.
KEPT_HOLD = "trueup_kept_hold"

# A duplicate asks the gate again this long after the other attempt's lease ends.
ASK_AGAIN_SECONDS = 0.5

# After so many attempts that lost their hold, beside the task's retries, it fails.
MAX_LOST_HOLDS = 5

# What a body meets that ends this attempt, but not its task.
_GOES_ON_ELSEWHERE = (HoldOvertakenError, ServiceUnavailableError, GateClosedError)

# A delivery that can't make its task's result again waits so long for the earlier delivery to store it.
RESULT_SECONDS = 2.0


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
    replay: ClassVar[Replay] = "redelivery"
    parser: ClassVar[ArgumentParser]
    # Whether it tells its state "started", once the gate has admitted it.
    tells_started: ClassVar[bool] = False
    # None: the body takes no model client.
    provider: ClassVar["staticmethod[[], Provider] | None"] = None

    throws = (TokensDenied, TaskIdReusedError)
    dont_autoretry_for = (TokensDenied, TaskIdReusedError)
    acks_late = True
    # Celery retries a lost pool process at most max_retries times; a rejected message would be redelivered for ever.
    retry_on_worker_lost = True
    # Seconds. Celery's default of 180 would keep a hold idle for that long.
    default_retry_delay = 2

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.parser.parse(args, kwargs)
        fingerprint = self.fingerprint(arguments)
        request = self.request
        # A direct call has no request of its own: there is none, or the request is the calling metered task's.
        outer = running_hold()
        if request.called_directly or (outer is not None and outer.task_id == request.id):
            with self._own_request(args, kwargs, fingerprint):
                return self._call(arguments, fingerprint)
        return self._call(arguments, fingerprint)

    @contextmanager
    def _own_request(self, args: tuple[Any, ...], kwargs: dict[str, Any], fingerprint: str) -> Iterator[None]:
        """Give a direct call a task id of its own.

        Inside another task (`map`, `starmap`, `chunks`, or a body that calls this one) the id is derived from the outer
        task's id, what is asked for, and the number of direct calls before it with the same request. After a
        redelivery of the outer task, the same call has the same id, so its paid calls are replayed. In a metered task,
        which may call from several threads, a retry that asks for new answers changes the ids too.
        """
        hold, outer = running_hold(), get_current_task()
        task_id, retries = str(uuid.uuid4()), 0
        within, numbers = None, None
        if hold is not None:
            within, numbers, retries = f"{hold.task_id}/{hold.scope}", hold.calls, hold.retries
        elif outer is not None and outer.request.id:
            within, retries = outer.request.id, outer.request.retries
            numbers = vars(outer.request).setdefault(CALLS_ATTRIBUTE, CallNumbers())
        if numbers is not None:
            number = numbers.take(f"{self.name}/{fingerprint}")
            task_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{within}/{self.name}/{fingerprint}/{number}"))
        self.push_request(id=task_id, args=args, kwargs=kwargs, retries=retries, called_directly=True)
        try:
            yield
        finally:
            self.pop_request()

    def _call(self, arguments: dict[str, Any], fingerprint: str) -> Any:
        try:
            tokens = self._estimate(arguments)
            if tokens is None:
                self._tell_started()
                return _json_safe(self._run(arguments))
            # Before the gate: without a provider the task can't work, and must not hold tokens that others could use.
            if self.provider is not None:
                self.provider()
            hold = self._open_hold_or_forget(arguments, fingerprint, tokens)
            with _closing(hold), keeping(hold), spending_from(hold):
                if hold.replay:
                    self._leave_delivered_work(hold)
                elif hold.follows or not is_random_id(hold.task_id):
                    self._forget_earlier_result()
                self._tell_started()
                return _json_safe(self._run_held(arguments, hold))
        except TokensDenied as denied:
            if self.on_denied == "return":
                return denied.payload
            raise
        except HoldBusyError as error:
            # The hold may be another one: of a task that the body calls, or of a block of `ai_tokens`. Then no other
            # message of this task need wait.
            is_own = error.task_id == self.request.id
            if is_own and error.redundant and not self.request.called_directly:
                raise Ignore(str(error)) from error
            waits = error.waits if is_own else None
            waiting = requeue(self, error, error.seconds + ASK_AGAIN_SECONDS, waits=waits)
            # The running attempt reports the task's state: a "retry" of this duplicate could overwrite its result.
            raise (Ignore(str(error)) if isinstance(waiting, Retry) else waiting) from error
        except (ServiceUnavailableError, GateClosedError) as error:
            raise requeue(self, error) from error

    def _run_held(self, arguments: dict[str, Any], hold: Hold) -> Any:
        try:
            return self._run_without_disguise(arguments, hold)
        except HoldExhaustedError:
            if hold.replay:
                # Closed here, because a retry would keep it, and then the requeued message would wait for its lease.
                _close(hold, completed=True)
                raise self._earlier_result() from None
            raise
        except HoldOvertakenError as error:
            if self.request.called_directly:
                raise
            self._limit_attempts(hold)
            if retrying(lambda connection: has_later_attempt(connection, hold)):
                raise leave_to_later_attempt(error) from error
            # The hold expired and no later attempt took over. Requeue the task; calls already paid for are replayed.
            raise requeue(self, error, ASK_AGAIN_SECONDS) from error

    def _run_without_disguise(self, arguments: dict[str, Any], hold: Hold) -> Any:
        """Run the body. If a library has turned trueup's error into one of its own, raise trueup's.

        Only errors by which the task goes on elsewhere: another one is for the body's caller, who gets what it raised.
        """
        try:
            return self._run(arguments)
        except (TrueupError, Retry, Ignore, Reject):
            raise
        except Exception as error:
            kinds = (*_GOES_ON_ELSEWHERE, HoldExhaustedError) if hold.replay else _GOES_ON_ELSEWHERE
            hidden = hidden_in(error, kinds)
            if hidden is None:
                raise
            raise hidden from None

    def _limit_attempts(self, hold: Hold) -> None:
        """Raise `HoldLifetimeError` for a task that has lost its hold too often: the next attempt would lose it too."""
        lost = retrying(lambda connection: count_lost(connection, hold)) - self.request.retries
        if lost >= MAX_LOST_HOLDS:
            settings = get_settings()
            raise HoldLifetimeError(hold.task_id, lost, settings.hold_ttl_seconds, settings.hold_max_seconds)

    def _earlier_result(self) -> Exception:
        """Return the exception for a task that an earlier delivery has completed, and whose answers were not kept.

        The result of that delivery stays. If there is none, because the delivery died before it stored it or because
        the caller has forgotten it, the task fails: a caller would wait for ever.
        """
        request = self.request
        error = ResultNotKeptError(request.id)
        if request.called_directly or request.is_eager:
            return error
        done: Exception = Ignore(f"task {request.id} was already completed by an earlier delivery")
        try:
            if self.backend.get_state(request.id) in READY_STATES:
                return done
        except NotImplementedError:  # no result backend
            return done
        return error if waits_of(self) else requeue(self, error, RESULT_SECONDS)

    def fingerprint(self, arguments: dict[str, Any]) -> str:
        """Return the fingerprint of a request with these parsed arguments."""
        return request_fingerprint(self.name, arguments, canonical_defaults(self.parser.defaults))

    def apply_async(self, args: Any = None, kwargs: Any = None, task_id: str | None = None, **options: Any) -> Any:
        """Send the task as Celery does. A stored result of another request with this id is deleted first.

        The caller would else take it for the result of this one. A retry has an id too, and no result yet. A retry or
        requeue returns only when the broker has its message.
        Raises `SettingsError` if no application with a broker is known.
        """
        if self.app.conf.task_always_eager:
            return super().apply_async(args, kwargs, task_id=task_id, **options)
        require_broker(self.app, self.name)
        if task_id is not None and "retries" not in options:
            with suppress(NotImplementedError):  # no result backend
                meta = self.backend.get_task_meta(task_id, cache=False)
                if meta["status"] in READY_STATES and not self._is_result_of(meta, args, kwargs):
                    self.backend.forget(task_id)
        if not is_republished(options) or "connection" in options:
            return super().apply_async(args, kwargs, task_id=task_id, **options)
        with confirmed(self.app, options) as confirmed_options:
            return super().apply_async(args, kwargs, task_id=task_id, **confirmed_options)

    def _is_result_of(self, meta: Mapping[str, Any], args: Any, kwargs: Any) -> bool:
        """Return whether a stored result belongs to this request. Without `result_extended` it does not say so."""
        if meta.get("name") != self.name:
            return False
        try:
            stored = self.parser.parse(tuple(meta["args"] or ()), dict(meta["kwargs"] or {}))
            return self.fingerprint(stored) == self.fingerprint(self.parser.parse(tuple(args or ()), kwargs or {}))
        except InvalidInputError:  # the worker will tell
            return False

    def _forget_earlier_result(self) -> None:
        """Delete the result that another request with this id, maybe another user's, has stored.

        Celery never overwrites a success: the caller would get the other request's result. A hold's `follows` knows
        only of requests of the same user.
        """
        if not self.request.called_directly and not self.request.is_eager:
            with suppress(NotImplementedError):  # no result backend
                self.backend.forget(self.request.id)

    def _leave_delivered_work(self, hold: Hold) -> None:
        """Raise `Ignore` if this task's result was delivered, or the stored one is that of another request with its id.

        Raises `TaskIdReusedError` if another request has had the id since: its caller must not get this one's result.
        """
        if self._is_delivered():
            raise Ignore(f"task {hold.task_id} was already completed, and its result is stored or ignored")
        if self._has_result_of_another():
            raise Ignore(f"task {hold.task_id} was already completed, and another request with its id has ended since")
        if hold.follows and not (self.request.called_directly or self.request.is_eager):
            raise TaskIdReusedError(hold.task_id)

    def _is_delivered(self) -> bool:
        """Return whether an earlier delivery that completed the work has also delivered its result.

        Then this delivery has nothing to do. A body that works longer than the broker's visibility timeout is
        redelivered while it works. If each redelivery ran it again, this would never end. Celery sends the tasks that
        follow before it stores the result. A task without a stored result therefore runs again if others follow it, and
        so does a member of a chord: the chord may still wait for its part.
        """
        request = self.request
        if request.called_directly or request.is_eager or request.chord:
            return False
        is_last = not (request.callbacks or request.chain)
        if self._ignores_result():
            return is_last
        try:
            return bool(self.backend.get_task_meta(request.id, cache=False)["status"] == SUCCESS)
        except NotImplementedError:  # no result backend
            return is_last

    def _ignores_result(self) -> bool:
        return bool(self.request.ignore_result or self.ignore_result)

    def _has_result_of_another(self) -> bool:
        """Return whether the stored result is another request's. Without `result_extended` it does not say so."""
        request = self.request
        if request.called_directly or request.is_eager:
            return False
        try:
            meta = self.backend.get_task_meta(request.id, cache=False)
        except NotImplementedError:  # no result backend
            return False
        is_extended = meta["status"] in READY_STATES and meta.get("name") is not None
        return is_extended and not self._is_result_of(meta, request.args, request.kwargs)

    def _tell_started(self) -> None:
        """Store the state "started". Celery would store it before it calls the task, and so hide a stored result."""
        request = self.request
        if not self.tells_started or request.called_directly or request.is_eager or self._ignores_result():
            return
        try:
            told = {"pid": os.getpid(), "hostname": request.hostname}
            self.backend.store_result(request.id, told, STARTED, request=request)
        except Exception:
            # Only information. The task has its tokens, and its result is stored with retries.
            logger.warning("state not stored task=%s", request.id, exc_info=True)

    def _run(self, arguments: dict[str, Any]) -> Any:
        try:
            return check_result(self.run(**arguments), self.name)
        except MemoryError as error:
            # Celery would end the whole worker, and each one to which the task is redelivered.
            raise OutOfMemoryError(self.name) from error
        except TrueupError as error:
            if getattr(error, "retryable", False) and not self.request.called_directly:
                raise retry_provider(self, error) from error
            raise

    def _estimate(self, arguments: dict[str, Any]) -> int | None:
        """Return the tokens to hold; None for a call that uses no AI: it holds no tokens and can't spend any."""
        estimate = self.estimated_tokens
        # Cast, because mypy takes a callable class attribute for a method; `metered_task` stores a static function.
        return cast("Estimator", estimate)(arguments) if callable(estimate) else estimate

    def _open_hold_or_forget(self, arguments: dict[str, Any], fingerprint: str, tokens: int) -> Hold:
        """Open the hold. On a denial, delete a result that another request with this id has stored.

        Celery would keep that success instead of the denial. It can't be this request's own: done work is not denied.
        """
        try:
            return self._open_hold(arguments, fingerprint, tokens)
        except TokensDenied:
            if not is_random_id(self.request.id):
                self._forget_earlier_result()
            raise

    def _open_hold(self, arguments: dict[str, Any], fingerprint: str, tokens: int) -> Hold:
        settings = get_settings()
        first_request, fresh_retries = identity_of(self, fingerprint)
        hold = retrying(
            lambda connection: open_hold(
                connection,
                user_id=arguments[USER_ARGUMENT],
                task_id=self.request.id,
                request=first_request,
                fresh_retries=fresh_retries,
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
    def on_bound(cls, app: Any) -> None:
        """Tell "started" in place of Celery, which would do it before the gate."""
        cls.tells_started = cls.tells_started or bool(cls.track_started)
        cls.track_started = False
        super().on_bound(app)

    @classmethod
    def bind(cls, app: Any) -> Any:
        """Bind the task to an application, with the methods that its Django fixup gives to all tasks."""
        for name in ON_COMMIT:
            if hasattr(app.Task, name) and not hasattr(cls, name):
                setattr(cls, name, getattr(app.Task, name))
        return super().bind(app)

    def retry(
        self, args: Any = None, kwargs: Any = None, exc: Exception | None = None, *more: Any, **options: Any
    ) -> Any:
        """Retry as Celery does, unless a later attempt has the hold: a retry would take the hold from it.

        The retry keeps the task's identity, whatever arguments it changes. If the body rejects its answers, the retry
        buys new ones; otherwise paid calls are replayed.
        """
        hold = running_hold()
        if hold is not None and retrying(lambda connection: has_later_attempt(connection, hold)):
            self._limit_attempts(hold)
            raise leave_to_later_attempt(HoldOvertakenError(hold.task_id, hold.attempt))
        if hold is not None:
            is_fresh = self.replay != "always" and asks_for_new_answers(exc or sys.exc_info()[1])
            headers = options.get("headers") or self.request.headers
            options["headers"] = retry_headers(headers, hold, is_fresh=is_fresh)
        try:
            return super().retry(args, kwargs, exc, *more, **options)
        except Reject as rejected:
            # The broker took no new message, and Celery would drop the task here.
            raise reject_after_pause(self, rejected.reason, rejected.reason) from rejected

    def on_replace(self, sig: Any) -> Any:
        """Close the hold before the task that replaces this one is sent: it has the same id, which must be free."""
        hold = running_hold()
        if hold is not None and hold.task_id == self.request.id:
            _close(hold, completed=True)
        return super().on_replace(sig)


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
