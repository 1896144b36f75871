"""Bodies of the views' answers, as OpenAPI shows them. Tokens are counts, percentages 0 to 100 with one decimal."""

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from trueup.accounts.account import Account
from trueup.accounts.summary import Plan, PlanKind, Summary
from trueup.accounts.user_ids import plain_id

Percent = Annotated[float, Field(ge=0, le=100, examples=[85.0])]
Tokens = Annotated[int, Field(ge=0)]
Id = Annotated[int | str, Field(examples=[7])]


class Body(BaseModel):
    """Base of every body. It refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AiUsage(Body):
    """Tokens since the start of the subscription, counted from the usage log.

    `tokens_remaining_in_db`: the legacy counter, for comparison; null if the host's value is null.
    """

    total_tokens_consumed: int = Field(examples=[1500])
    original_tokens_included: Tokens = Field(examples=[10_000])
    actual_tokens_remaining: Tokens = Field(examples=[8500])
    tokens_remaining_in_db: int | None = Field(examples=[8450])

    @classmethod
    def of(cls, account: Account) -> "AiUsage":
        return cls(
            total_tokens_consumed=account.consumed,
            original_tokens_included=account.original,
            actual_tokens_remaining=account.remaining,
            tokens_remaining_in_db=account.counter,
        )


class PlanBody(Body):
    """A plan. `duration_days` null: its tokens have no duration."""

    kind: PlanKind
    id: Id
    name: str | None = Field(examples=["Starter"])
    tokens_included: Tokens = Field(examples=[10_000])
    duration_days: int | None = Field(examples=[30])
    is_active: bool

    @classmethod
    def of(cls, plan: Plan) -> "PlanBody":
        return cls(**vars(plan))


class ListedPlan(PlanBody):
    """A plan on sale, or the user's own. `ai_usage` null: the user's tokens are not of this plan."""

    is_current: bool
    ai_usage: AiUsage | None


class Subscription(Body):
    """The user's subscription. `start_date` null: all usage counts; `end_date` and `days_remaining` null: unlimited.

    `tokens_remaining`: the accurate figure, not the legacy counter.
    """

    plan: PlanBody | None
    is_active: bool
    start_date: datetime | None
    end_date: datetime | None
    days_remaining: int | None = Field(examples=[25])
    tokens_remaining: Tokens = Field(examples=[8500])
    ai_usage: AiUsage

    @classmethod
    def of(cls, summary: Summary) -> "Subscription | None":
        account = summary.account
        if not account.subscribed:
            return None
        return cls(
            plan=PlanBody.of(summary.plan) if summary.plan else None,
            is_active=account.is_active,
            start_date=account.window_start,
            end_date=account.end_date,
            days_remaining=account.days_remaining,
            tokens_remaining=account.remaining,
            ai_usage=AiUsage.of(account),
        )


class Profile(Body):
    """The user, and the remaining shares of time and tokens. `subscription_remaining` is 100 if it is unlimited."""

    id: Id
    username: str | None = Field(examples=["sara"])
    email: str | None = Field(examples=["sara@example.com"])
    subscription_remaining: Percent
    token_usage_remaining: Percent

    @classmethod
    def of(cls, summary: Summary) -> "Profile":
        return cls(
            id=plain_id(summary.account.user_id) or 0,
            username=summary.username,
            email=summary.email,
            subscription_remaining=summary.subscription_remaining,
            token_usage_remaining=summary.token_usage_remaining,
        )


class AccountOverview(Profile):
    """The user with the subscription. `current_subscription` null: the user has none."""

    current_subscription: Subscription | None

    @classmethod
    def of(cls, summary: Summary) -> "AccountOverview":
        return cls(**vars(Profile.of(summary)), current_subscription=Subscription.of(summary))


class BillingOverview(Body):
    """The subscription and its tokens. `ai_tokens_total`: consumed since the start of the subscription."""

    current_subscription: Subscription | None
    ai_tokens_total: int = Field(examples=[1500])
    original_tokens_included: Tokens = Field(examples=[10_000])
    actual_tokens_remaining: Tokens = Field(examples=[8500])

    @classmethod
    def of(cls, summary: Summary) -> "BillingOverview":
        return cls(
            current_subscription=Subscription.of(summary),
            ai_tokens_total=summary.account.consumed,
            original_tokens_included=summary.account.original,
            actual_tokens_remaining=summary.account.remaining,
        )


class Plans(Body):
    """Plans on sale, the user's own first."""

    plans: list[ListedPlan]

    @classmethod
    def of(cls, summary: Summary) -> "Plans":
        usage = AiUsage.of(summary.account)
        return cls(
            plans=[
                ListedPlan(
                    **vars(plan), is_current=summary.is_current(plan), ai_usage=usage if plan == summary.plan else None
                )
                for plan in summary.plans
            ]
        )
