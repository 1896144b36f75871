"""What a host does beside billing, as rules of a state machine: each to the database and to the model."""

from datetime import timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.support.host import START, Host
from tests.support.model_of_billing import Grant, ModelUser, Row

PLAN = 2_000
TABLES = (
    "accounts_user, billing_tokenplan, billing_fullplan, billing_subscription, ai_usage_log, trueup.balance, "
    "trueup.usage_delta, trueup.token_grant, trueup.hold, trueup.charge, trueup.call_intent, trueup.drift, "
    "trueup.reconcile_run"
)

who = st.sampled_from([0, 0, 0, 1])
sizes = st.sampled_from([0, 1, 50, 100, 300, 600, 1_000])
few = st.sampled_from([1, 50, 100, 300])
shifts = st.integers(-3, 1).map(lambda hours: timedelta(hours=hours))
# Few rules of many kinds: hypothesis takes all rules as often, and most steps shall be trueup's own.
LOG_ACTS = ("log", "log", "change_row", "flip_rows", "delete_row", "truncate_log")
SUBSCRIPTION_ACTS = ("renew", "change_plan", "change_term", "unsubscribe", "set_counter", "grant", "grant", "revoke")


class HostMachine(RuleBasedStateMachine):
    """Two users, so that steps meet; and their host, which does as it likes."""

    host: Host

    @initialize()
    def sign_up(self) -> None:
        self.host.execute(f"TRUNCATE {TABLES} CASCADE")
        self.now = START + timedelta(hours=2)
        self.users = [ModelUser(user=self.host.subscriber(PLAN), plan=PLAN, start=START, counter=PLAN) for _ in "12"]
        self.time_passes(0)

    @rule(seconds=st.sampled_from([1, 29, 30, 61, 200]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        self.host.execute("UPDATE clock.now SET at = :now", now=self.now)

    @rule(who=who, act=st.sampled_from(LOG_ACTS), data=st.data())
    def host_writes_the_log(self, who: int, act: str, data: st.DataObject) -> None:
        getattr(self, f"_{act}")(self.users[who], data)

    @rule(who=who, act=st.sampled_from(SUBSCRIPTION_ACTS), data=st.data())
    def host_changes_the_subscription(self, who: int, act: str, data: st.DataObject) -> None:
        user = self.users[who]
        if user.subscribed:
            getattr(self, f"_{act}")(user, data)
        else:
            self._subscribe(user)

    def _draw_row(self, user: ModelUser, data: st.DataObject) -> Row:
        return Row(tokens=data.draw(few), success=data.draw(st.booleans()), at=user.start + data.draw(shifts))

    def _log(self, user: ModelUser, data: st.DataObject) -> None:
        row = self._draw_row(user, data)
        number = self.host.log(user.user, row.tokens, success=row.success, at=row.at)
        user.log[str(number)] = row

    def _change_row(self, owner: ModelUser, data: st.DataObject) -> None:
        if not owner.log:
            return
        number, user = data.draw(st.sampled_from(sorted(owner.log))), data.draw(st.sampled_from(self.users))
        row = self._draw_row(user, data)
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

    def _flip_rows(self, user: ModelUser, data: st.DataObject) -> None:
        for row in user.log.values():
            row.success = not row.success
        self.host.execute("UPDATE ai_usage_log SET success = NOT success WHERE user_id = :user", user=user.user)

    def _delete_row(self, user: ModelUser, data: st.DataObject) -> None:
        if user.log:
            number = data.draw(st.sampled_from(sorted(user.log)))
            del user.log[number]
            self.host.execute("DELETE FROM ai_usage_log WHERE id = CAST(:number AS uuid)", number=number)

    def _truncate_log(self, user: ModelUser, data: st.DataObject) -> None:
        if data.draw(st.integers(0, 2)) == 2:  # rarely
            self.host.execute("TRUNCATE ai_usage_log")
            for each in self.users:
                each.log.clear()

    def _set(self, user: ModelUser, change: str, **values: Any) -> None:
        self.host.execute(f"UPDATE billing_subscription SET {change} WHERE user_id = :user", user=user.user, **values)

    def _renew(self, user: ModelUser, data: st.DataObject) -> None:
        user.start = data.draw(st.sampled_from([self.now, user.start])) + data.draw(shifts)
        self._set(user, "start_date = :start", start=user.start)

    def _change_plan(self, user: ModelUser, data: st.DataObject) -> None:
        user.plan = data.draw(st.sampled_from([0, 1_000, PLAN, 3_000]))
        self._set(user, "token_plan_id = :plan", plan=self.host.plan(user.plan))

    def _change_term(self, user: ModelUser, data: st.DataObject) -> None:
        seconds = data.draw(st.sampled_from([None, None, 0, 60]))
        user.is_active = data.draw(st.booleans()) or not user.is_active
        user.end = None if seconds is None else self.now + timedelta(seconds=seconds)
        self._set(user, "is_active = :active, end_date = :end", active=user.is_active, end=user.end)

    def _unsubscribe(self, user: ModelUser, data: st.DataObject) -> None:
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

    def _set_counter(self, user: ModelUser, data: st.DataObject) -> None:
        user.counter = data.draw(st.sampled_from([None, -5, 0, 1, 700, PLAN, 5_000]))
        self._set(user, "tokens_remaining = :counter", counter=user.counter)

    def _grant(self, user: ModelUser, data: st.DataObject) -> None:
        ends = data.draw(st.sampled_from([None, 60, 200]))
        grant = Grant(
            tokens=data.draw(few),
            granted_at=self.now,
            expires_at=None if ends is None else self.now + timedelta(seconds=ends),
        )
        number = self.host.value(
            "INSERT INTO trueup.token_grant (user_id, tokens, reason, granted_at, expires_at) "
            "VALUES (:user, :tokens, 'test', :now, :expires_at) RETURNING id",
            user=user.user,
            tokens=grant.tokens,
            now=grant.granted_at,
            expires_at=grant.expires_at,
        )
        user.grants[number] = grant

    def _revoke(self, user: ModelUser, data: st.DataObject) -> None:
        if user.grants:
            number = data.draw(st.sampled_from(sorted(user.grants)))
            user.grants[number].revoked = True
            self.host.execute("UPDATE trueup.token_grant SET revoked_at = :now WHERE id = :id", now=self.now, id=number)
