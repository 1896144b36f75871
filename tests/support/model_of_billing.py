"""A model of billing in plain Python: lists and sums, without deltas, locks or a cache."""

import json
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tests.support.model_of_grants import GrantBook, Logged

TOLERANCE = timedelta(minutes=5)
LOG_NAMESPACE = uuid.UUID("5b0e1c38-3d0b-5a34-9d5c-7d1f4b6f2a90")


@dataclass(kw_only=True)
class Row:
    """A row of the usage log."""

    tokens: int
    success: bool
    at: datetime


@dataclass(kw_only=True)
class ModelHold:
    """`over`, `excess`: tokens charged beyond the hold, and beyond the granted maximum of the calls."""

    task: str
    request: str
    attempt: int
    retries: int
    reserved: int
    lease_until: datetime
    expires_at: datetime
    duplicate_until: datetime | None = None
    duplicate_waits: int = 0
    status: str = "open"
    completed: bool = False
    body_ended: bool = False
    covered: int = 0
    charged: int = 0
    calls: int = 0
    over: int = 0
    excess: int = 0

    @property
    def rest(self) -> int:
        return self.reserved - self.covered if self.status == "open" else 0


@dataclass(frozen=True, kw_only=True)
class ModelCharge:
    attempt: int
    total: int
    covered: int
    late: bool


@dataclass(kw_only=True)
class Call:
    bound: int
    started_at: datetime
    outcome: str = "started"


@dataclass(frozen=True, kw_only=True)
class Handle:
    """An attempt's knowledge of its hold."""

    user: int
    task: str
    attempt: int


def log_id(handle: Handle, key: str) -> str:
    """Return the id of a call's log row. It is always the same, so that no row is written twice."""
    return str(uuid.uuid5(LOG_NAMESPACE, json.dumps([str(handle.user), handle.task, key])))


@dataclass(frozen=True)
class Busy:
    """Return the gate's answer while another attempt works. `redundant`: another duplicate waits already."""

    seconds: float
    redundant: bool
    waits: int


class Reused:
    """The answer of the gate while another request with this task id has a hold."""


@dataclass(frozen=True)
class Denied:
    reason: str


class Overtaken(Exception):  # noqa: N818 - an answer, no fault
    pass


@dataclass(kw_only=True)
class ModelUser:
    """One user: its subscription, its log, its grants, and all actions of its tasks."""

    user: int
    plan: int
    start: datetime
    end: datetime | None = None
    subscribed: bool = True
    is_active: bool = True
    counter: int | None = None
    log: dict[str, Row] = field(default_factory=dict)
    book: GrantBook = field(default_factory=GrantBook)
    holds: list[ModelHold] = field(default_factory=list)
    charges: dict[tuple[str, str], ModelCharge] = field(default_factory=dict)
    calls: dict[tuple[str, str, int], Call] = field(default_factory=dict)

    def original(self, now: datetime) -> int:
        if not self.subscribed:
            return 0
        return self.plan + self.book.adds(self.start, self.plan, self.counted(), now)

    def counted(self) -> list[Logged]:
        return [(row.at, row.tokens) for row in self.log.values() if row.success]

    def lock(self, now: datetime) -> None:
        """Update the balance as a lock on it does: end overdue holds, and settle the use of grants."""
        self.expire_holds(now)
        if self.subscribed:
            self.book.settle(self.start, self.plan, self.counted(), now)

    def consumed(self) -> int:
        if not self.subscribed:
            return 0
        return sum(row.tokens for row in self.log.values() if row.success and row.at >= self.start)

    def dated(self, now: datetime) -> datetime:
        """Return the time at which usage of now counts as logged. The host's clock may be a little ahead."""
        return self.start if self.subscribed and now < self.start <= now + TOLERANCE else now

    def held(self, now: datetime) -> int:
        """Return the held tokens at that time. An overdue hold counts only with the tokens that it keeps."""
        return sum(hold.rest if hold.expires_at > now else self._kept(hold, now) for hold in self.holds)

    def reason(self, tokens: int, now: datetime) -> str | None:
        """Return the reason that a task of that size may not run."""
        if not self.subscribed:
            return "no_subscription"
        if not self.is_active or self.start > now + TOLERANCE:
            return "subscription_deactivated"
        if self.end is not None and self.end < now:
            return "subscription_expired"
        if self.original(now) <= self.consumed():
            return "no_tokens_remaining"
        left = self.original(now) - self.consumed() - self.held(now)
        return "insufficient_tokens" if left < tokens else None

    def last_hold(self, task: str, request: str | None = None) -> ModelHold | None:
        of_task = (hold for hold in reversed(self.holds) if hold.task == task and request in (None, hold.request))
        return next(of_task, None)

    def open_hold_of(self, task: str) -> ModelHold | None:
        hold = self.last_hold(task)
        return hold if hold is not None and hold.status == "open" else None

    def in_flight(self, task: str, *, but: tuple[str, int] | None = None, by: int | None = None) -> int:
        return sum(
            call.bound
            for (of, key, attempt), call in self.calls.items()
            if of == task and call.outcome == "started" and (key, attempt) != but and by in (None, attempt)
        )

    def spendable(self, hold: ModelHold, but: tuple[str, int] | None = None) -> int:
        return max(0, hold.rest - self.in_flight(hold.task, but=but))

    def expire_holds(self, now: datetime) -> tuple[int, int]:
        """End overdue holds, except with calls in flight. Returns the number of ended holds and the released tokens."""
        overdue = [hold for hold in self.holds if hold.status == "open" and hold.expires_at <= now]
        before = sum(hold.rest for hold in overdue)
        for hold in overdue:
            if self._kept(hold, now):
                self._end_body(hold, self._calls_until(hold))
            else:
                hold.status = "expired"
        return sum(hold.status == "expired" for hold in overdue), before - sum(hold.rest for hold in overdue)

    def _kept(self, hold: ModelHold, now: datetime) -> int:
        """Keep the maximum cost of calls in flight beyond the hold's time once, for as long as its last duration."""
        in_time = not hold.body_ended and self._calls_until(hold) > now
        return min(self.in_flight(hold.task), hold.rest) if in_time else 0

    def _calls_until(self, hold: ModelHold) -> datetime:
        begun = [
            call.started_at for (of, _, _), call in self.calls.items() if of == hold.task and call.outcome == "started"
        ]
        return hold.expires_at + (hold.expires_at - max(begun, default=hold.expires_at))

    def _end_body(self, hold: ModelHold, until: datetime) -> None:
        """From now on the hold exists only for calls in flight."""
        hold.body_ended, hold.expires_at = True, until
        self._keep_for_calls(hold)

    def open_hold(
        self, task: str, request: str, tokens: int, retries: int, lease: int, ttl: int, waits: int, now: datetime
    ) -> ModelHold | Busy | Reused | Denied:
        self.lock(now)
        last, hold = self.last_hold(task), self.last_hold(task, request)
        replay = self.replays(task, request)
        if last is not None and last.status == "open" and last.request != request:
            return Busy((last.lease_until - now).total_seconds(), True, 0) if replay else Reused()
        if hold is not None and hold.status == "open" and not hold.body_ended:
            if retries <= hold.retries and hold.lease_until > now:
                return self._wait(hold, waits, now)
            kept = self.in_flight(task, by=hold.attempt)
            hold.reserved += kept if self.reason(kept, now) is None else 0
            return self._taken_over(hold, retries, lease, ttl, now)
        reason = None if replay else self.reason(tokens, now)
        if reason is not None:
            return Denied(reason)
        if hold is not None and hold.status == "open":
            hold.reserved += 0 if replay else tokens
            hold.completed, hold.body_ended = replay, False
            return self._taken_over(hold, retries, lease, ttl, now)
        self._forget_calls(task)
        opened = ModelHold(
            task=task,
            request=request,
            attempt=last.attempt + 1 if last else 1,
            retries=hold.retries if hold and replay else retries,
            reserved=0 if replay else tokens,
            lease_until=now + timedelta(seconds=lease),
            expires_at=now + timedelta(seconds=ttl),
            completed=replay,
        )
        self.holds.append(opened)
        return opened

    def _taken_over(self, hold: ModelHold, retries: int, lease: int, ttl: int, now: datetime) -> ModelHold:
        hold.attempt += 1
        hold.retries = max(hold.retries, retries)
        hold.lease_until, hold.expires_at = now + timedelta(seconds=lease), now + timedelta(seconds=ttl)
        return hold

    def _wait(self, hold: ModelHold, waits: int, now: datetime) -> Busy:
        is_waited_for = hold.duplicate_until is not None and hold.duplicate_until > now
        redundant = is_waited_for and waits < hold.duplicate_waits
        waits = max(waits, hold.duplicate_waits) + 1
        busy_until = min(hold.lease_until, now + timedelta(minutes=1))
        if not redundant:
            hold.duplicate_until, hold.duplicate_waits = busy_until, waits
        return Busy((busy_until - now).total_seconds(), redundant, waits)

    def replays(self, task: str, request: str) -> bool:
        """Return whether the request's work is done: its charges stay, and it makes no more calls."""
        hold = self.last_hold(task, request)
        return hold is not None and hold.completed

    def _forget_calls(self, task: str, attempt: int | None = None) -> None:
        """End those calls' attempt by a crash, so the outcome of the calls is unknown."""
        for (of, _, by), call in self.calls.items():
            if of == task and attempt in (None, by) and call.outcome == "started":
                call.outcome = "unknown"

    def abandon_calls(self, task: str) -> None:
        """End the process that has the hold by a crash."""
        hold = self.open_hold_of(task)
        if hold is not None:
            self._forget_calls(task, hold.attempt)

    def own_hold(self, handle: Handle) -> ModelHold:
        hold = self.open_hold_of(handle.task)
        if hold is None or hold.attempt != handle.attempt or hold.body_ended:
            raise Overtaken
        return hold

    def begin_call(self, handle: Handle, key: str, bound: int, lease: int, ttl: int, now: datetime) -> int | None:
        hold = self.own_hold(handle)
        hold.lease_until = max(hold.lease_until, now + timedelta(seconds=lease))
        hold.expires_at = max(hold.expires_at, now + timedelta(seconds=ttl))
        left = self.spendable(hold, (key, handle.attempt))
        if bound > left:
            return left
        self.calls[handle.task, key, handle.attempt] = Call(bound=bound, started_at=now)
        return None

    def end_call(self, handle: Handle, key: str, *, unknown: bool) -> None:
        place = (handle.task, key, handle.attempt)
        if place in self.calls and unknown:
            self.calls[place].outcome = "unknown"
        elif not unknown:
            self.calls.pop(place, None)

    def extend_hold(self, handle: Handle, tokens: int, now: datetime) -> tuple[str | None, int]:
        self.lock(now)
        reason = self.reason(tokens, now)
        hold = self.own_hold(handle)
        if hold.completed:
            reason = None
        elif reason is None:
            hold.reserved += tokens
        return reason, self.spendable(hold)

    def record_charge(self, handle: Handle, key: str, total: int, now: datetime) -> tuple[bool, bool, int, int]:
        """Return (recorded, late, tokens over the hold, tokens left), as a charge does."""
        self.lock(now)
        hold = self.open_hold_of(handle.task)
        owns = hold is not None and hold.attempt == handle.attempt and not hold.body_ended
        place = (handle.task, key, handle.attempt)
        known = self.charges.get((handle.task, key))
        if known is not None and known.attempt != handle.attempt:
            key = f"{key}~{handle.attempt}"
            known = self.charges.get((handle.task, key))
        recorded = known is None
        if known is None:
            covered = min(total, hold.rest) if hold else 0
            if hold is not None and hold.body_ended:
                covered = min(total, self.spendable(hold, (place[1], handle.attempt)))
            known = ModelCharge(attempt=handle.attempt, total=total, covered=covered, late=not owns)
            self.charges[handle.task, key] = known
            self.log[log_id(handle, key)] = Row(tokens=total, success=True, at=self.dated(now))
            call = self.calls.pop(place, None)
            if hold is not None:
                hold.covered += covered
                hold.charged += total
                hold.calls += 1
                hold.over += total - covered
                leave = call.bound if call is not None and call.outcome == "started" else 0
                hold.excess += max(0, total - leave)
                if hold.body_ended:
                    self._keep_for_calls(hold)
            if self.counter is not None and self.counter > 0:
                self.counter = max(0, self.counter - total)
        left = self.spendable(hold) if hold is not None and owns else 0
        return recorded, known.late, known.total - known.covered, left

    def close_hold(self, task: str, attempt: int | None, *, completed: bool) -> str | None:
        hold = self.open_hold_of(task)
        if hold is None or hold.body_ended or attempt not in (None, hold.attempt):
            return None
        hold.completed = hold.completed or completed
        others = self.in_flight(task) - self.in_flight(task, by=hold.attempt)
        if min(others, hold.rest) > 0:
            self._forget_calls(task, hold.attempt)
            self._end_body(hold, self._calls_until(hold))
        else:
            hold.status = "settled" if hold.calls else "released"
        return hold.status

    def _keep_for_calls(self, hold: ModelHold) -> None:
        """Reduce a hold whose body has ended to the maximum cost of its calls in flight. Without such calls it ends."""
        kept = min(self.in_flight(hold.task), hold.rest)
        hold.reserved = hold.covered + kept
        hold.status = "open" if kept else "settled"

    def unrecorded(self) -> list[tuple[str, str, int]]:
        """Return the calls that may have been billed and have no charge: task, key, bound."""
        return sorted(
            (task, key, call.bound)
            for (task, key, _), call in self.calls.items()
            if call.outcome == "unknown" or self.open_hold_of(task) is None
        )
