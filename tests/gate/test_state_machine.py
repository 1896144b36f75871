"""Any sequence of operations of trueup and the host leaves the state that a plain model computes.

A failure prints the steps that lead to it.
"""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, Engine, create_engine

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.host_machine import HOST_STEPS, Draw, HostMachine, sizes
from tests.support.model_of_billing import Busy, Denied, Handle, ModelUser, Overtaken, Reused
from tests.support.work import OWNER, charge_tokens, hold_tokens
from trueup.accounts.account import read_account
from trueup.accounts.grants import list_grants
from trueup.errors import HoldBusyError, HoldOvertakenError, TaskIdReusedError, TokensDenied
from trueup.gate.decision import check_access
from trueup.gate.holds import Hold, abandon_calls, close_abandoned_hold, close_hold, expire_holds, list_holds
from trueup.gate.provider_calls import begin_call, end_call, extend_hold, list_unrecorded_calls
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile
from trueup.usage.charges import Charge

# These are found before PostgreSQL's own: reconcile, too, then lives at the machine's time. trueup's functions have a
# search path of their own, which ignores the session's. Triggers keep the server's clock, as `HostMachine` expects.
CLOCK = """
    CREATE SCHEMA clock;
    CREATE TABLE clock.now AS SELECT clock_timestamp() AS at;
    CREATE FUNCTION clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT at FROM clock.now';
    CREATE FUNCTION clock.statement_timestamp() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT at FROM clock.now';
    DO $$ DECLARE f regprocedure; BEGIN
        FOR f IN SELECT oid FROM pg_proc WHERE pronamespace = 'trueup'::regnamespace
                 AND prorettype <> 'trigger'::regtype AND proconfig IS NOT NULL LOOP
            EXECUTE format('ALTER FUNCTION %s SET search_path = clock, pg_catalog, pg_temp', f);
        END LOOP;
    END $$
"""

CHARGES = """
    SELECT user_id, task_id, call_key, attempt, tokens_total, tokens_covered, late FROM trueup.charge
    ORDER BY user_id, task_id, call_key
"""
# Mostly the same task and call.
tasks = st.sampled_from(["a", "a", "a", "b"])
keys = st.sampled_from(["1", "1", "2"])
owners = st.sampled_from([OWNER, OWNER, OWNER, "test:2"])
STEPS = (
    *["open_hold"] * 6,
    *["begin_call", "record_charge", "close_hold"] * 4,
    *["end_call", "extend_hold"] * 2,
    *["close_abandoned_hold", "abandon_calls", "expire_holds", "reconcile"],
    *HOST_STEPS,
)


class BillingMachine(HostMachine):
    """trueup beside the host: two tasks for each user, and attempts of them that overtake each other."""

    connection: Connection
    engine: Engine

    @rule(step=st.sampled_from(STEPS), data=st.data())
    def step(self, step: str, data: st.DataObject) -> None:
        """Do one step of any kind. Hypothesis would drop whole rules, and most need an open hold to have an effect."""
        getattr(self, step)(data.draw)

    def draw_attempt(self, draw: Draw) -> tuple[ModelUser, Handle, Hold]:
        """Draw an attempt of a task: the one to which the gate gives the hold, the last one, or an earlier one."""
        user, task = self.draw_user_and_task(draw)
        back = draw(st.sampled_from([None, None, None, 0, 1, 2]))
        if back is None and user.open_hold_of(task) is None:
            self._open_hold(user, task=task, tokens=300, retries=0, lease=30, ttl=60)
        last = user.last_hold(task)
        attempt = max(1, last.attempt - (back or 0)) if last else 1
        hold = Hold(
            user_id=user.user,
            task_id=task,
            feature_name="Test",
            section="chat",
            attempt=attempt,
            reattached=False,
            replay=False,
            tokens_left=0,
            expires_at=self.now,
        )
        return user, Handle(user=user.user, task=task, attempt=attempt), hold

    def committed(self, user: ModelUser) -> int:
        """Return the tokens that the database has committed: consumed + held."""
        account = read_account(self.connection, user.user, now=self.now)
        return account.consumed + account.held

    def draw_user_and_task(self, draw: Draw) -> tuple[ModelUser, str]:
        """Draw a user and one of the user's own task ids: requests of two users can't have one id at the same time."""
        user = self.draw_user(draw)
        return user, f"{draw(tasks)}-{user.user}"

    def open_hold(self, draw: Draw) -> None:
        user, task = self.draw_user_and_task(draw)
        self._open_hold(
            user,
            task=task,
            request=draw(st.sampled_from(["", "", "", "other"])),
            tokens=draw(sizes),
            retries=draw(st.sampled_from([0, 0, 0, 1, 1, 2])),
            lease=draw(st.sampled_from([0, 30, 90])),
            ttl=draw(st.sampled_from([60, 300])),
            waits=draw(st.sampled_from([0, 0, 1, 2])),
        )

    def _open_hold(
        self,
        user: ModelUser,
        *,
        task: str,
        tokens: int,
        retries: int,
        lease: int,
        ttl: int,
        waits: int = 0,
        request: str = "",
    ) -> None:
        told = check_access(self.connection, user.user, tokens, "Test", now=self.now)
        user.expire_holds(self.now)  # as the gate does first
        replay, reattached = user.replays(task, request), user.open_hold_of(task)
        call: dict[str, Any] = {"task": task, "request": request, "retries": retries, "lease": lease, "ttl": ttl}
        call |= {"waits": waits, "now": self.now}
        expected = user.open_hold(tokens=tokens, **call)
        if isinstance(expected, Busy):
            with pytest.raises(HoldBusyError) as busy:
                hold_tokens(self.connection, user.user, tokens, **call)
            told_to_wait = Busy(busy.value.seconds, busy.value.redundant, busy.value.waits)
            assert told_to_wait == expected
            return
        if isinstance(expected, Reused):
            with pytest.raises(TaskIdReusedError):
                hold_tokens(self.connection, user.user, tokens, **call)
            return
        if isinstance(expected, Denied):
            with pytest.raises(TokensDenied) as denied:
                hold_tokens(self.connection, user.user, tokens, **call)
            assert denied.value.error_code == told["reason"] == expected.reason
            return
        hold = hold_tokens(self.connection, user.user, tokens, **call)
        assert (hold.attempt, hold.replay) == (expected.attempt, replay)
        assert hold.reattached == (reattached is not None and reattached is expected)
        assert hold.tokens_left == user.spendable(expected)
        if not (hold.replay or hold.reattached):
            assert told["has_access"]
            assert self.committed(user) <= user.original(self.now)  # I2

    def begin_call(self, draw: Draw) -> None:
        user, handle, hold = self.draw_attempt(draw)
        key, bound, ttl = draw(keys), draw(sizes), draw(st.sampled_from([60, 300]))
        call = {"lease_seconds": 30, "ttl_seconds": ttl, "now": self.now}
        try:
            expected = user.begin_call(handle, key, bound, 30, ttl, self.now)
        except Overtaken:
            with pytest.raises(HoldOvertakenError):
                begin_call(self.connection, hold, call_key=key, max_tokens=bound, **call)
        else:
            assert begin_call(self.connection, hold, call_key=key, max_tokens=bound, **call) == expected

    def end_call(self, draw: Draw) -> None:
        user, handle, hold = self.draw_attempt(draw)
        key, unknown = draw(keys), draw(st.booleans())
        user.end_call(handle, key, unknown=unknown)
        end_call(self.connection, hold, call_key=key, unknown=unknown)

    def extend_hold(self, draw: Draw) -> None:
        user, handle, hold = self.draw_attempt(draw)
        tokens = draw(sizes)
        try:
            expected = user.extend_hold(handle, tokens, self.now)
        except Overtaken:
            with pytest.raises(HoldOvertakenError):
                extend_hold(self.connection, hold, tokens, now=self.now)
            return
        assert extend_hold(self.connection, hold, tokens, now=self.now) == expected
        if expected[0] is None and not user.own_hold(handle).completed:
            assert self.committed(user) <= user.original(self.now)  # I2

    def record_charge(self, draw: Draw) -> None:
        user, handle, hold = self.draw_attempt(draw)
        key, tokens = draw(keys), draw(sizes)
        before = self.committed(user)
        recorded, late, over, left = user.record_charge(handle, key, tokens, self.now)
        charge = charge_tokens(self.connection, hold, tokens, key=key, now=self.now)
        assert charge == Charge(recorded=recorded, late=late, tokens_over=over, tokens_left=left)
        # Only tokens that no hold covered add to the committed tokens. Overdue holds are left out before and after.
        assert self.committed(user) <= before + (over if recorded else 0)

    def close_hold(self, draw: Draw) -> None:
        user, handle, hold = self.draw_attempt(draw)
        completed = draw(st.sampled_from([True, True, False]))
        expected = user.close_hold(handle.task, handle.attempt, completed=completed)
        assert close_hold(self.connection, hold, completed=completed, now=self.now) == expected

    def close_abandoned_hold(self, draw: Draw) -> None:
        (user, task), owner = self.draw_user_and_task(draw), draw(owners)
        expected = user.close_hold(task, None, completed=False) if owner == OWNER else None
        assert close_abandoned_hold(self.connection, user.user, task, owner=owner, now=self.now) == expected

    def abandon_calls(self, draw: Draw) -> None:
        (user, task), owner = self.draw_user_and_task(draw), draw(owners)
        if owner == OWNER:
            user.abandon_calls(task)
        abandon_calls(self.connection, user.user, task, owner=owner)

    def expire_holds(self, draw: Draw) -> None:
        expired = [user.expire_holds(self.now) for user in self.users]
        assert expire_holds(self.connection, now=self.now) == tuple(map(sum, zip(*expired, strict=True)))

    def reconcile(self, draw: Draw) -> None:
        self.host.execute("UPDATE clock.now SET at = :now", now=self.now)
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
                user.counter = finding.written
        self._learn_which_expired()
        self._learn_what_was_settled()

    def _learn_which_expired(self) -> None:
        """A refreshed balance ends overdue holds; an up-to-date balance is not refreshed. Both are correct."""
        still_open = {(row.user_id, row.task_id, row.expires_at) for row in list_holds(self.connection)}
        for user in self.users:
            overdue = [hold for hold in user.holds if hold.status == "open" and hold.expires_at <= self.now]
            if not any((user.user, hold.task, hold.expires_at) in still_open for hold in overdue):
                user.expire_holds(self.now)

    def _learn_what_was_settled(self) -> None:
        """A refreshed balance settles its grants; an up-to-date balance is not refreshed. Both are correct."""
        for user in self.users:
            if self._settled(user) != self._settled_in_model(user):
                user.lock(self.now)

    def _settled(self, user: ModelUser) -> tuple[Any, Any, Any]:
        told = self.host.execute(
            "SELECT window_start, changed_at, settled_until FROM trueup.window_change WHERE user_id = :u ORDER BY id",
            u=user.user,
        ).all()
        uses = self.host.execute(
            "SELECT grant_id, window_start, tokens FROM trueup.grant_use WHERE user_id = :u", u=user.user
        )
        return (
            [(row.window_start, row.changed_at) for row in told],
            {row.window_start: row.settled_until for row in told if row.settled_until},
            {(row.grant_id, row.window_start): row.tokens for row in uses},
        )

    def _settled_in_model(self, user: ModelUser) -> tuple[Any, Any, Any]:
        book = user.book
        return [(change.window, change.at) for change in book.changes], book.closed, book.settled

    @invariant()
    def the_books_are_true(self) -> None:
        assert_true(self.host)  # I1, I4
        for user in self.users:
            # Usage exceeds a hold only if the provider bills more than the call's maximum cost.
            assert all(hold.over <= hold.excess for hold in user.holds)
            account = read_account(self.connection, user.user, now=self.now)
            counter = user.counter if user.subscribed else None
            held = user.held(self.now) if user.subscribed else 0
            assert (account.original, account.consumed) == (user.original(self.now), user.consumed())
            assert (account.held, account.counter) == (held, counter)
            assert self._settled(user) == self._settled_in_model(user)
            if user.subscribed:
                left = user.book.left(user.start, user.plan, user.counted(), self.now)
                assert {g.id: g.tokens_left for g in list_grants(self.connection, user.user, now=self.now)} == left

        self._check_rows()

    def _check_rows(self) -> None:
        holds = [
            (user.user, hold.task, hold.attempt, hold.status, hold.reserved, hold.charged, hold.rest, hold.expires_at)
            for user in self.users
            for hold in user.holds
        ]
        rows = list_holds(self.connection, every_status=True, limit=1_000)
        assert sorted(holds) == sorted(
            (
                r.user_id,
                r.task_id,
                r.attempt,
                r.status,
                r.tokens_reserved,
                r.tokens_charged,
                r.tokens_left,
                r.expires_at,
            )
            for r in rows
        )
        charges = [
            (user.user, *key, charge.attempt, charge.total, charge.covered, charge.late)
            for user in self.users
            for key, charge in user.charges.items()
        ]
        assert sorted(charges) == [tuple(row) for row in self.host.execute(CHARGES)]
        unrecorded = [(user.user, *call) for user in self.users for call in user.unrecorded()]
        listed = list_unrecorded_calls(self.connection, limit=1_000)
        assert sorted(unrecorded) == sorted((c.user_id, c.task_id, c.call_key, c.tokens_bound) for c in listed)


@pytest.fixture
def machine(host: Host, database: str) -> Iterator[type[BillingMachine]]:
    host.execute(CLOCK)
    engine = create_engine(database, connect_args={"options": "-c timezone=UTC -c search_path=clock,pg_catalog,public"})
    # Hypothesis asks the garbage collector what refers to its random numbers. On Python 3.14 nothing frozen is found.
    gc.unfreeze()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield type("Machine", (BillingMachine,), {"host": host, "connection": connection, "engine": engine})
    gc.freeze()
    engine.dispose()


@pytest.mark.parametrize(("examples", "steps"), [(10, 50), pytest.param(200, 80, marks=pytest.mark.long)])
def test_billing_does_what_its_model_says(machine: type[BillingMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
