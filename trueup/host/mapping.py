"""Where the host keeps its users, plans, subscriptions and AI usage log: table and column names.

The defaults are those of a Django application. A table may be qualified by its schema ("public.billing_subscription").
Some columns may be missing: what stands for them then is said in `trueup.host.setting_values`.
"""

import hashlib
from typing import Annotated, Self

from pydantic import BeforeValidator, model_validator

from trueup.host.fields import (
    FIELDS,
    NOUNS,
    FullPlanTable,
    IdType,
    Names,
    Noun,
    PaymentTable,
    SubscriptionTable,
    TokenPlanTable,
    TokenUsageTable,
    UsageLogTable,
    UserTable,
)
from trueup.host.setting_values import columns_of, quote_identifier, quote_table

__all__ = [
    "FullPlanTable",
    "HostMapping",
    "PaymentTable",
    "SubscriptionTable",
    "TokenPlanTable",
    "TokenUsageTable",
    "UsageLogTable",
    "UserIdType",
    "UserTable",
    "quote_identifier",
    "quote_table",
]

UserIdType = IdType

_IF_THERE = BeforeValidator(lambda given: {"table": None} if given is False else given)


class HostMapping(Names):
    """Names of the host's tables and columns, and the type of its user ids. A table that is `false` is not there."""

    user_id_type: UserIdType = "bigint"
    usage_log_id_type: IdType = "uuid"
    user: Annotated[UserTable, _IF_THERE] = UserTable()
    token_plan: Annotated[TokenPlanTable, _IF_THERE] = TokenPlanTable()
    full_plan: Annotated[FullPlanTable, _IF_THERE] = FullPlanTable()
    subscription: SubscriptionTable = SubscriptionTable()
    usage_log: UsageLogTable = UsageLogTable()
    token_usage: Annotated[TokenUsageTable, _IF_THERE] = TokenUsageTable()
    payment: Annotated[PaymentTable, _IF_THERE] = PaymentTable()

    @model_validator(mode="after")
    def _tokens_come_from_somewhere(self) -> Self:
        if self.token_plan.table is self.full_plan.table is self.subscription.tokens_included is None:
            raise ValueError(
                "without token_plan and full_plan nothing says what a subscription includes: "
                "set subscription.tokens_included"
            )
        return self

    def tables(self) -> list[str]:
        """Return the host's tables that are mapped."""
        return [table for noun in NOUNS if (table := getattr(self, noun).table) is not None]

    def columns(self, noun: Noun) -> list[tuple[str, str]]:
        """Return the host's columns that are used of a noun, as (field, column); none if its table is not there.

        A field that is missing has none; an expression has one for each column that it names.
        """
        part = getattr(self, noun)
        if part.table is None:
            return []
        return [
            (field, column)
            for field in FIELDS[noun]
            if self.has_plan_of(field)
            for column in columns_of(getattr(part, field))
        ]

    def counted_columns(self) -> list[str]:
        """Return the log's columns that say what is used, by whom and when."""
        fields = FIELDS["usage_log"]
        return list(dict.fromkeys(column for field, column in self.columns("usage_log") if fields[field].counted))

    def fingerprint(self) -> str:
        """Return a short hash of the whole mapping, to notice that the database was set up for another one."""
        # A field that came later is left out where it is not used: an upgrade alone makes no other mapping.
        unused: dict[str, set[str]] = {
            noun: {field for field in FIELDS[noun] if getattr(getattr(self, noun), field) is None} for noun in NOUNS
        }
        return hashlib.sha256(self.model_dump_json(exclude=unused).encode()).hexdigest()[:16]

    def has_plan_of(self, field: str) -> bool:
        """Return whether the plans that a key leads to are there; for any other field, True."""
        table = {"token_plan_id": self.token_plan.table, "full_plan_id": self.full_plan.table}.get(field, field)
        return table is not None
