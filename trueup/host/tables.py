"""The host's tables, and what trueup needs of each. The defaults are the names of a Django application."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from trueup.host.columns import (
    Active,
    Column,
    Compared,
    Count,
    Counts,
    Document,
    End,
    Flag,
    PlanTokens,
    Table,
    Value,
    Words,
)

# What trueup's own rows in the log consist of. The error, if there is one, comes after.
WRITTEN = (
    "id",
    "user_id",
    "section",
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "response_time_ms",
    "success",
    "model_name",
    "metadata",
    "created_at",
)


class Names(BaseModel):
    # Pydantic before 2.10 warns of each field whose name begins with "model_", unless this is empty.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class UserTable(Names):
    """Optional: `table` None: users are those with a subscription, and the views show no names."""

    table: Table | None = "accounts_user"
    id: Column = "id"
    username: Words = "username"
    email: Words = "email"


class TokenPlanTable(Names):
    """Optional: `table` None: the host has no such plans."""

    table: Table | None = "billing_tokenplan"
    id: Column = "id"
    name: Words = "name"
    tokens_included: Column = "tokens_included"
    is_active: Flag = "is_active"


class FullPlanTable(TokenPlanTable):
    table: Table | None = "billing_fullplan"
    duration_days: Count = "duration_days"


class SubscriptionTable(Names):
    """`tokens_included`: what the subscription includes. None: its plan says that."""

    table: Table = "billing_subscription"
    id: Column = "id"
    user_id: Column = "user_id"
    token_plan_id: Column = "token_plan_id"
    full_plan_id: Column = "full_plan_id"
    start_date: Column = "start_date"
    end_date: End = "end_date"
    tokens_remaining: Column = "tokens_remaining"
    is_active: Active = "is_active"
    tokens_included: PlanTokens = None


class UsageLogTable(Names):
    """`counts`: which rows count. None: those with `success`; with it, `success` is only what is mapped explicitly."""

    table: Table = "ai_usage_log"
    id: Column = "id"
    user_id: Column = "user_id"
    section: Words = "section"
    prompt_tokens: Count = "prompt_tokens"
    completion_tokens: Count = "completion_tokens"
    total_tokens: Column = "total_tokens"
    response_time_ms: Count = "response_time_ms"
    success: Flag = "success"
    model_name: Words = "model_name"
    error_message: Column = "error_message"
    metadata: Document = "metadata"
    created_at: Column = "created_at"
    counts: Counts = None

    @model_validator(mode="before")
    @classmethod
    def _success_is_not_needed(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("counts") is not None and "success" not in given:
            return given | {"success": {"value": True}}
        return given

    @property
    def written(self) -> list[str]:
        """The columns that trueup's own rows fill, in order."""
        compared = [self.counts.column] if isinstance(self.counts, Compared) else []
        return [*(getattr(self, field) for field in self.written_fields), *compared]

    @property
    def written_fields(self) -> list[str]:
        """What those columns are, but for the one that says by a value that a row counts: that comes last."""
        compared = self.counts.column if isinstance(self.counts, Compared) else None
        names = {field: getattr(self, field) for field in WRITTEN}
        return [field for field, name in names.items() if isinstance(name, str) and name != compared]

    @property
    def tells_failure(self) -> bool:
        """Whether a row can say that its call failed. Where none can, failed calls get no row."""
        if isinstance(self.counts, Compared):
            return self.counts.failed is not None
        return isinstance(self.success, str)


class TokenUsageTable(Names):
    """Optional: one row for each decrement of the counter. `table` None: the host keeps no such rows."""

    table: Table | None = None
    id: Column = "id"
    subscription_id: Column = "subscription_id"
    used_tokens: Column = "used_tokens"
    usage_date: Column = "usage_date"
    description: Column = "description"


class PaymentTable(Names):
    """Optional: what was bought. `table` None: the host keeps no such rows.

    `completed_status`: the value of `status` that says the money came.
    """

    table: Table | None = None
    id: Column = "id"
    user_id: Column = "user_id"
    subscription_id: Column = "subscription_id"
    token_plan_id: Column = "token_plan_id"
    full_plan_id: Column = "full_plan_id"
    status: Column = "status"
    payment_date: Column = "payment_date"
    transaction_id: Column = "transaction_id"
    completed_status: Value = "completed"
