"""Any sequence of billing's operations, and of the host's, leaves what a plain model says.

Longer: `STATE_MACHINE_EXAMPLES=500 STATE_MACHINE_STEPS=100 pytest tests/billing/test_state_machine.py`, which also
draws anew each time. A failure prints the steps that lead to it.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.pool import NullPool, QueuePool

from billing.access import check_access
from billing.accounts import read_account
from billing.calls import begin_call, end_call, extend_hold, list_unrecorded_calls
from billing.charges import Charge
from billing.errors import HoldBusyError, HoldOvertakenError, TokensDenied
from billing.holds import Hold, close_abandoned_hold, close_hold, expire_holds, list_holds
from billing.mapping import HostMapping
from billing.reconcile import reconcile
from billing.status import read_status
from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.model_of_billing import Busy, Denied, Grant, Handle, ModelUser, Overtaken, Row
from tests.support.work import charge_tokens, hold_tokens

EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "40"))
STEPS = int(os.environ.get("STATE_MACHINE_STEPS", "30"))
LONG = "STATE_MACHINE_EXAMPLES" in os.environ

PLAN = 1_000
TABLES = (
    "accounts_user, billing_tokenplan, billing_fullplan, billing_subscription, ai_usage_log, trueup.balance, "
    "trueup.usage_delta, trueup.token_grant, trueup.hold, trueup.charge, trueup.call_intent, trueup.drift, "
    "trueup.reconcile_run"
)
# `clock_timestamp()` finds this one before PostgreSQL's own: reconcile, too, then lives at the machine's time.
CLOCK = """
    CREATE SCHEMA clock;
    CREATE TABLE clock.now AS SELECT CAST(:start AS timestamptz) AS at;
    CREATE FUNCTION clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT at FROM clock.now';
"""

who = st.integers(0, 1)
tasks = st.sampled_from(["a", "b"])
keys = st.sampled_from(["1", "2"])
sizes = st.sampled_from([0, 1, 50, 100, 300, 600, 1_000])
moments = st.integers(-3, 1).map(lambda hours: timedelta(hours=hours))


class BillingMachine(RuleBasedStateMachine):
    """Two users with two tasks each, so that steps meet."""

    attempts = Bundle("attempts")
    host: Host
    connection: Connection
    engine: Engine

    @initialize()
    def sign_up(self) -> None:
        self.host.execute(f"TRUNCATE {TABLES} CASCADE")
        self.now = START + timedelta(hours=2)
        self.host.execute("UPDATE clock.now SET at = :now", now=self.now)
        self.users = [ModelUser(user=self.host.subscriber(PLAN), plan=PLAN, start=START, counter=PLAN) for _ in "12"]

    def user(self, handle: Handle) -> ModelUser:
        return next(user for user in self.users if user.user == handle.user)

    def committed(self, user: ModelUser) -> int:
        """Return what the database has promised: consumed + held."""
        account = read_account(self.connection, user.user, now=self.now)
        return account.consumed + account.held

    # trueup's own work

    @rule(
        target=attempts,
        who=who,
        task=tasks,
        tokens=sizes,
        retries=st.integers(0, 2),
        lease=st.sampled_from([0, 30, 90]),
        ttl=st.sampled_from([60, 300]),
    )
    def open_hold(self, who: int, task: str, tokens: int, retries: int, lease: int, ttl: int) -> Any:
        user = self.users[who]
        told = check_access(self.connection, user.user, tokens, "Test", now=self.now)
        replay, reattached = user.replays(task, retries), user.open_hold_of(task)
        call = {"task": task, "retries": retries, "lease": lease, "ttl": ttl, "now": self.now}
        try:
            expected = user.open(tokens=tokens, **call)
        except Busy as busy:
            with pytest.raises(HoldBusyError) as error:
                hold_tokens(self.connection, user.user, tokens, **call)
            assert error.value.seconds == busy.seconds
            return multiple()
        except Denied as denied:
            with pytest.raises(TokensDenied) as refusal:
                hold_tokens(self.connection, user.user, tokens, **call)
            assert refusal.value.error_code == denied.reason == told["reason"]
            return multiple()
        hold = hold_tokens(self.connection, user.user, tokens, **call)
        handle = Handle(user=user.user, task=task, attempt=hold.attempt)
        assert (hold.attempt, hold.replay) == (expected.attempt, replay)
        assert hold.reattached == (reattached is not None and reattached is expected)
        assert hold.tokens_left == user.spendable(expected)
        if not (hold.replay or hold.reattached):
            assert told["has_access"]
            assert self.committed(user) <= user.original(self.now)  # I2
        return handle

    def hold_of(self, handle: Handle) -> Hold:
        return Hold(
            user_id=handle.user,
            task_id=handle.task,
            feature_name="Test",
            section="chat",
            attempt=handle.attempt,
            reattached=False,
            replay=False,
            tokens_left=0,
            expires_at=self.now,
        )

    @rule(handle=attempts, key=keys, bound=sizes, ttl=st.sampled_from([60, 300]))
    def begin_call(self, handle: Handle, key: str, bound: int, ttl: int) -> None:
        call = {"lease_seconds": 30, "ttl_seconds": ttl, "now": self.now}
        hold = self.hold_of(handle)
        try:
            expected = self.user(handle).begin(handle, key, bound, 30, ttl, self.now)
        except Overtaken:
            with pytest.raises(HoldOvertakenError):
                begin_call(self.connection, hold, call_key=key, tokens_bound=bound, **call)
        else:
            assert begin_call(self.connection, hold, call_key=key, tokens_bound=bound, **call) == expected

    @rule(handle=attempts, key=keys, unknown=st.booleans())
    def end_call(self, handle: Handle, key: str, unknown: bool) -> None:
        self.user(handle).end(handle, key, unknown=unknown)
        end_call(self.connection, self.hold_of(handle), call_key=key, unknown=unknown)

    @rule(handle=attempts, tokens=sizes)
    def extend_hold(self, handle: Handle, tokens: int) -> None:
        user = self.user(handle)
        try:
            expected = user.extend(handle, tokens, self.now)
        except Overtaken:
            with pytest.raises(HoldOvertakenError):
                extend_hold(self.connection, self.hold_of(handle), tokens, now=self.now)
            return
        assert extend_hold(self.connection, self.hold_of(handle), tokens, now=self.now) == expected
        if expected[0] is None and not user.own_hold(handle).completed:
            assert self.committed(user) <= user.original(self.now)  # I2

    @rule(handle=attempts, key=keys, tokens=sizes)
    def record_charge(self, handle: Handle, key: str, tokens: int) -> None:
        user = self.user(handle)
        before = self.committed(user)
        recorded, late, over, left = user.charge(handle, key, tokens, self.now)
        charge = charge_tokens(self.connection, self.hold_of(handle), tokens, key=key, now=self.now)
        assert charge == Charge(recorded=recorded, late=late, tokens_over=over, tokens_left=left)
        # Only what a hold did not cover adds to what was promised; overdue holds are left out before and after.
        assert self.committed(user) <= before + (over if recorded else 0)

    @rule(handle=attempts, completed=st.booleans())
    def close_hold(self, handle: Handle, completed: bool) -> None:
        expected = self.user(handle).close(handle.task, handle.attempt, completed=completed)
        assert close_hold(self.connection, self.hold_of(handle), completed=completed, now=self.now) == expected

    @rule(who=who, task=tasks)
    def close_abandoned_hold(self, who: int, task: str) -> None:
        expected = self.users[who].close(task, None, completed=False)
        assert close_abandoned_hold(self.connection, self.users[who].user, task, now=self.now) == expected

    @rule()
    def expire_holds(self) -> None:
        expired = [user.expire(self.now) for user in self.users]
        assert expire_holds(self.connection, now=self.now) == tuple(map(sum, zip(*expired, strict=True)))

    @rule()
    def reconcile(self) -> None:
        drifted = {
            user.user: (user.counter, max(0, user.original(self.now) - user.consumed()))
            for user in self.users
            if user.subscribed and user.counter != max(0, user.original(self.now) - user.consumed())
        }
        summary = reconcile(self.engine, HostMapping(), keep_findings=True)
        assert {f.drift.user_id: (f.drift.observed, f.drift.expected) for f in summary.findings} == drifted
        for finding in summary.findings:
            user = next(user for user in self.users if user.user == finding.drift.user_id)
            if finding.action == "corrected":
                user.counter = finding.drift.expected
        self._learn_which_expired()

    def _learn_which_expired(self) -> None:
        """A refreshed balance gives overdue holds back; one that is fresh is not looked at. Either is right."""
        rows = {(row.user_id, row.task_id): row for row in list_holds(self.connection)}
        for user in self.users:
            if not any((user.user, hold.task) in rows for hold in user.holds if hold.expires_at <= self.now):
                user.expire(self.now)

    @rule(seconds=st.sampled_from([1, 29, 30, 61, 200, 3_600]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        self.host.execute("UPDATE clock.now SET at = :now", now=self.now)

    # The host's

    @rule(who=who, tokens=sizes, success=st.booleans(), shift=moments)
    def log(self, who: int, tokens: int, success: bool, shift: timedelta) -> None:
        at = self.users[who].start + shift
        row = self.host.log(self.users[who].user, tokens, success=success, at=at)
        self.users[who].log[str(row)] = Row(tokens=tokens, success=success, at=at)
