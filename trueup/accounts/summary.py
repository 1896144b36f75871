"""The account, plan and days that views show, read in one snapshot and one round trip."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import Connection, TextClause

from trueup.accounts.account import ACCOUNT_COLUMNS, CLOCK, SECONDS_A_DAY, Account, account_of
from trueup.accounts.subscriptions import several_subscriptions
from trueup.accounts.user_ids import UserId
from trueup.host.mapping import HostMapping
from trueup.host.sql import render_statement

PlanKind = Literal["token", "full"]
MAX_PLANS = 500


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan of the host. `tokens_included` is a count. `duration_days` None: the tokens have no duration."""

    kind: PlanKind
    id: int | str
    name: str | None
    tokens_included: int
    duration_days: int | None
    is_active: bool


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A user in one snapshot.

    `known` False: the host has no such user. `plan`: the token plan, else the full plan; None if there is none.
    `plans`: the active plans and the user's own, if requested. Percentages are 0 to 100 with one decimal.
    """

    known: bool
    username: str | None
    email: str | None
    account: Account
    own_plans: tuple[Plan, ...]
    plans: tuple[Plan, ...] = field(default=(), repr=False)

    @property
    def plan(self) -> Plan | None:
        return self.own_plans[0] if self.own_plans else None

    @property
    def token_usage_remaining(self) -> float:
        """remaining / original in percent; 0 if original is 0."""
        return percent(self.account.remaining, self.account.original)

    @property
    def subscription_remaining(self) -> float:
        """Full days left / duration in percent; 100 if unlimited, 0 without a subscription."""
        days = self.account.days_remaining
        if not self.account.subscribed:
            return 0.0
        if days is None:
            return 100.0
        return percent(days, self.duration_days) if self.duration_days else 0.0

    @property
    def duration_days(self) -> float | None:
        """The plan's duration, else the time from start to end. None: the subscription has no end or no start."""
        account = self.account
        planned = next((plan.duration_days for plan in self.own_plans if plan.duration_days), None)
        if planned is not None or account.end_date is None or account.window_start is None:
            return planned
        return max(0.0, (account.end_date - account.window_start).total_seconds() / SECONDS_A_DAY)

    def is_current(self, plan: Plan) -> bool:
        return any((plan.kind, plan.id) == (own.kind, own.id) for own in self.own_plans)


def percent(part: float, whole: float) -> float:
    """Return part / whole in percent, 0 to 100 with one decimal; 0 if the whole is 0."""
    return round(min(100.0, max(0.0, 100 * part / whole)), 1) if whole > 0 else 0.0


# One statement has one snapshot, so the figures of a view can't contradict each other while tokens are spent.
# A user who is unknown or has no subscription has a row too.
_READ = """
    WITH {{ clock }}, own AS (
        SELECT {{ subscription.token_plan_id("s") }} AS token_plan, {{ subscription.full_plan_id("s") }} AS full_plan
        FROM {{ subscription }} s WHERE s.{{ subscription.user_id }} = :user_id
        LIMIT 1  -- several subscriptions give several rows below, which are refused
    ), plan AS (
        SELECT 'token' AS kind, to_jsonb(p.{{ token_plan.id }}) AS id, {{ token_plan.name("p") }} AS name,
               p.{{ token_plan.tokens_included }} AS tokens_included, NULL::integer AS duration_days,
               {{ token_plan.is_active("p") }} AS is_active,
               p.{{ token_plan.id }} IS NOT DISTINCT FROM (SELECT token_plan FROM own) AS is_own
        FROM {{ token_plan }} p
        WHERE p.{{ token_plan.id }} = (SELECT token_plan FROM own)
           OR ({{ with_plans }} AND {{ token_plan.is_active("p") }})
        UNION ALL
        SELECT 'full', to_jsonb(p.{{ full_plan.id }}), {{ full_plan.name("p") }}, p.{{ full_plan.tokens_included }},
               {{ full_plan.duration_days("p") }}, {{ full_plan.is_active("p") }},
               p.{{ full_plan.id }} IS NOT DISTINCT FROM (SELECT full_plan FROM own)
        FROM {{ full_plan }} p
        WHERE p.{{ full_plan.id }} = (SELECT full_plan FROM own)
           OR ({{ with_plans }} AND {{ full_plan.is_active("p") }})
    ), listed AS (
        -- The user's own plans first. The token plan precedes the full plan, as `plan` wants it.
        SELECT row_number() OVER (ORDER BY is_own DESC, kind DESC, tokens_included, id) AS place, plan.* FROM plan
        ORDER BY place LIMIT :most
    )
    SELECT {{ account_columns }}, u.{{ user.id }} IS NOT NULL AS known, {{ user.username("u") }} AS username,
           {{ user.email("u") }} AS email, (SELECT jsonb_agg(to_jsonb(l) ORDER BY l.place) FROM listed l) AS plans
    FROM clock
    LEFT JOIN {{ user }} u ON u.{{ user.id }} = :user_id
    LEFT JOIN LATERAL (SELECT * FROM trueup.accounts(clock.at) t WHERE t.user_id = :user_id) a ON true
"""


def read_summary(
    connection: Connection,
    mapping: HostMapping,
    user_id: UserId,
    *,
    with_plans: bool = False,
    now: datetime | None = None,
) -> Summary:
    """Return a user's summary.

    `with_plans`: include the active plans, at most `MAX_PLANS`. `now`: None means the database's clock.
    Raises `SeveralSubscriptionsError`.
    """
    values = {"user_id": user_id, "most": MAX_PLANS, "at": now}
    rows = connection.execute(_statement(mapping, with_plans), values).all()
    if len(rows) > 1:
        raise several_subscriptions(user_id)
    (row,) = rows
    listed = [(_plan(plan), plan["is_own"]) for plan in row.plans or ()]
    return Summary(
        known=row.known,
        username=row.username,
        email=row.email,
        account=account_of(user_id, row),
        own_plans=tuple(plan for plan, is_own in listed if is_own),
        plans=tuple(plan for plan, _ in listed) if with_plans else (),
    )


@lru_cache(maxsize=8)
def _statement(mapping: HostMapping, with_plans: bool) -> TextClause:
    return render_statement(_READ, mapping, clock=CLOCK, account_columns=ACCOUNT_COLUMNS, with_plans=with_plans)


def _plan(row: Mapping[str, Any]) -> Plan:
    return Plan(
        kind=row["kind"],
        id=row["id"],
        name=row["name"],
        # A missing or negative number counts as 0, as in the budget.
        tokens_included=max(0, row["tokens_included"] or 0),
        duration_days=row["duration_days"],
        is_active=row["is_active"] is True,
    )
