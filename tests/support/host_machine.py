"""The host's own actions, as steps of a state machine. Each step changes the database and the model."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from tests.support.host import START, Host
from tests.support.model_of_billing import ModelUser, Row
from tests.support.model_of_grants import Change, Grant

PLAN = 2_000
TABLES = (
    "accounts_user, billing_tokenplan, billing_fullplan, billing_subscription, ai_usage_log, trueup.balance, "
    "trueup.usage_delta, trueup.token_grant, trueup.grant_use, trueup.window_change, trueup.hold, trueup.charge, "
    "trueup.call_intent, trueup.counter_entry, trueup.drift, trueup.drift_decision, trueup.reconcile_run"
)

sizes = st.sampled_from([0, 1, 50, 100, 300, 600, 1_000])
few = st.sampled_from([1, 50, 100, 300])
shifts = st.integers(-3, 1).map(lambda hours: timedelta(hours=hours))
Draw = Callable[[st.SearchStrategy[Any]], Any]
HOST_STEPS = (
    *["time_passes"] * 5,
    *["log"] * 3,
    *["change_row", "flip_rows", "delete_row", "truncate_log"],
    *["renew", "change_plan", "change_term", "unsubscribe", "set_counter", "grant", "revoke"],
)


class HostMachine(RuleBasedStateMachine):
    """Two users, so that steps affect the same user, and their host, which acts in any order."""

    host: Host

    @initialize()
    def sign_up(self) -> None:
        self.host.execute(f"TRUNCATE {TABLES} CASCADE")
        self.now = START + timedelta(hours=2)
        self.users = [ModelUser(user=self.host.subscriber(PLAN), plan=PLAN, start=START, counter=PLAN) for _ in "12"]

    def draw_user(self, draw: Draw) -> ModelUser:
        """Draw a user, one of them more often, because conflicts between attempts of one task need several steps."""
        return self.users[draw(st.sampled_from([0, 0, 0, 1]))]

    def draw_subscriber(self, draw: Draw) -> ModelUser:
        """Draw a user. A user without a subscription gets one now."""
        user = self.draw_user(draw)
        if not user.subscribed:
            self._subscribe(user)
        return user

    def time_passes(self, draw: Draw) -> None:
        self.now += timedelta(seconds=draw(st.sampled_from([1, 1, 29, 30, 61, 200])))

    def draw_row(self, user: ModelUser, draw: Draw) -> Row:
        return Row(tokens=draw(few), success=draw(st.booleans()), at=user.start + draw(shifts))

    def log(self, draw: Draw) -> None:
        user = self.draw_user(draw)
        row = self.draw_row(user, draw)
        number = self.host.log(user.user, row.tokens, success=row.success, at=row.at)
        user.log[str(number)] = row

    def change_row(self, draw: Draw) -> None:
        owner = self.draw_user(draw)
        if not owner.log:
            return
        number, user = draw(st.sampled_from(sorted(owner.log))), draw(st.sampled_from(self.users))
        row = self.draw_row(user, draw)
        del owner.log[number]
        user.log[number] = row
        self.host.execute(
            "UPDATE ai_usage_log SET total_tokens = :tokens, success = :success, created_at = :at, user_id = :user "
            "WHERE id = CAST(:number AS uuid)",
            tokens=row.tokens,
            success=row.success,
            at=row.at,
            user=user.user,
            number=number,
        )

    def flip_rows(self, draw: Draw) -> None:
        user = self.draw_user(draw)
        for row in user.log.values():
            row.success = not row.success
        self.host.execute("UPDATE ai_usage_log SET success = NOT success WHERE user_id = :user", user=user.user)

    def delete_row(self, draw: Draw) -> None:
        user = self.draw_user(draw)
        if user.log:
            number = draw(st.sampled_from(sorted(user.log)))
            del user.log[number]
            self.host.execute("DELETE FROM ai_usage_log WHERE id = CAST(:number AS uuid)", number=number)

    def truncate_log(self, draw: Draw) -> None:
        if draw(st.booleans()):
            self.host.execute("TRUNCATE ai_usage_log")
            for each in self.users:
                each.log.clear()

    def _set(self, user: ModelUser, change: str, **values: Any) -> None:
        self.host.execute(f"UPDATE billing_subscription SET {change} WHERE user_id = :user", user=user.user, **values)

    def renew(self, draw: Draw) -> None:
        user = self.draw_subscriber(draw)
        before = self._terms(user)
        user.start = draw(st.sampled_from([self.now, user.start])) + draw(shifts)
        self._set(user, "start_date = :start", start=user.start)
        if user.start != before.window:
            self._record(user, before, self._terms(user))

    def change_plan(self, draw: Draw) -> None:
        user = self.draw_subscriber(draw)
        before = self._terms(user)
        user.plan = draw(st.sampled_from([0, 1_000, PLAN, 3_000]))
        self._set(user, "token_plan_id = :plan", plan=self.host.plan(user.plan))
        self._record(user, before, self._terms(user))

    def _terms(self, user: ModelUser) -> Change:
        return Change(at=self.now, window=user.start, plan=user.plan)

    def _record(self, user: ModelUser, *changes: Change) -> None:
        """Change the times of the trigger's records to the machine's clock. The trigger uses the server's clock."""
        user.book.record(*changes)
        self.host.execute(
            "UPDATE trueup.window_change SET changed_at = :now WHERE id IN (SELECT id FROM trueup.window_change "
            "WHERE user_id = :user AND plan_tokens IS NULL ORDER BY id DESC LIMIT :count)",
            now=self.now,
            user=user.user,
            count=len(changes),
        )

    def change_term(self, draw: Draw) -> None:
        user = self.draw_subscriber(draw)
        seconds = draw(st.sampled_from([None, None, 0, 60]))
        user.is_active = draw(st.booleans()) or not user.is_active
        user.end = None if seconds is None else self.now + timedelta(seconds=seconds)
        self._set(user, "is_active = :active, end_date = :end", active=user.is_active, end=user.end)

    def unsubscribe(self, draw: Draw) -> None:
        user = self.draw_subscriber(draw)
        user.subscribed = False
        self.host.execute("DELETE FROM billing_subscription WHERE user_id = :user", user=user.user)

    def _subscribe(self, user: ModelUser) -> None:
        user.subscribed, user.is_active, user.end, user.counter = True, True, None, None
        self.host.execute(
            "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, is_active) "
            "VALUES (:user, :user, :plan, :start, true)",
            user=user.user,
            plan=self.host.plan(user.plan),
            start=user.start,
        )
        self._record(user, self._terms(user))

    def set_counter(self, draw: Draw) -> None:
        user = self.draw_subscriber(draw)
        user.counter = draw(st.sampled_from([None, -5, 0, 1, 700, PLAN, 5_000]))
        self._set(user, "tokens_remaining = :counter", counter=user.counter)

    def grant(self, draw: Draw) -> None:
        user = self.draw_subscriber(draw)
        ends = draw(st.sampled_from([None, 60, 200, 4_000]))
        expires_at = None if ends is None else self.now + timedelta(seconds=ends)
        tokens = draw(few)
        user.lock(self.now)
        number = self.host.value(
            "SELECT grant_id FROM trueup.grant_tokens(:user, :tokens, 'test', CAST(gen_random_uuid() AS text), "
            "CAST(:expires_at AS timestamptz), 'me', :now)",
            user=user.user,
            tokens=tokens,
            expires_at=expires_at,
            now=self.now,
        )
        user.book.grants[number] = Grant(id=number, tokens=tokens, granted_at=self.now, expires_at=expires_at)
        user.lock(self.now)

    def revoke(self, draw: Draw) -> None:
        user = self.draw_subscriber(draw)
        if not user.book.grants:
            return
        grant = user.book.grants[draw(st.sampled_from(sorted(user.book.grants)))]
        user.lock(self.now)
        left = user.book.left(user.start, user.plan, user.counted(), self.now)[grant.id]
        row = self.host.execute(
            "SELECT * FROM trueup.revoke_grant(:user, :id, 'test', 'me', :now)",
            user=user.user,
            id=grant.id,
            now=self.now,
        ).one()
        if grant.revoked_at is not None or grant.ends <= self.now:
            assert row.outcome == ("already" if grant.revoked_at else "ended")
        else:
            assert (row.outcome, row.tokens) == ("revoked", left)
            grant.revoked_at = self.now
            user.lock(self.now)
