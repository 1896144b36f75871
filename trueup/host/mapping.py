"""The mapping: the names of the host's tables and columns for users, plans, subscriptions and the AI usage log.

The defaults are those of a Django application. A table may have its schema's name ("public.billing_subscription").
`trueup.host.setting_values` defines the settings that may replace a missing column.
"""

import hashlib
from typing import Annotated, Any, Self

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
from trueup.host.setting_values import TimeZone, columns_of, quote_identifier, quote_table

__all__ = ["HostMapping", "UserIdType", "quote_identifier", "quote_table"]

UserIdType = IdType

_IF_THERE = BeforeValidator(lambda given: {"table": None} if given is False else given)


class HostMapping(Names):
    """The names of the host's tables and columns, and the types of its ids. `false`: the host has no such table.

    `time_zone`: of the host's times that have none; None: not set, as "UTC".
    """

    user_id_type: UserIdType = "bigint"
    usage_log_id_type: IdType = "uuid"
    time_zone: TimeZone = None
    user: Annotated[UserTable, _IF_THERE] = UserTable()
    token_plan: Annotated[TokenPlanTable, _IF_THERE] = TokenPlanTable()
    full_plan: Annotated[FullPlanTable, _IF_THERE] = FullPlanTable()
    subscription: SubscriptionTable = SubscriptionTable()
    usage_log: UsageLogTable = UsageLogTable()
    token_usage: Annotated[TokenUsageTable, _IF_THERE] = TokenUsageTable()
    payment: Annotated[PaymentTable, _IF_THERE] = PaymentTable()

    @model_validator(mode="after")
    def _plans_are_there_to_add(self) -> Self:
        if self.subscription.plans == "sum" and None in (self.token_plan.table, self.full_plan.table):
            raise ValueError('subscription.tokens_included = "sum" adds two plans: map token_plan and full_plan')
        return self

    @model_validator(mode="after")
    def _tokens_come_from_somewhere(self) -> Self:
        if self.token_plan.table is self.full_plan.table is self.subscription.tokens_included is None:
            raise ValueError(
                "without token_plan and full_plan the tokens of a subscription are unknown: "
                "set subscription.tokens_included"
            )
        return self

    def tables(self) -> list[str]:
        """Return the mapped tables."""
        return [table for noun in NOUNS if (table := getattr(self, noun).table) is not None]

    def columns(self, noun: Noun) -> list[tuple[str, str]]:
        """Return the columns of a noun that trueup uses, as (field, column); none if the host has no such table.

        A constant has no column. An expression has each column that it names.
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
        """Return the log's columns that define the usage, its user and its time."""
        fields = FIELDS["usage_log"]
        return list(dict.fromkeys(column for field, column in self.columns("usage_log") if fields[field].counted))

    def fingerprint(self) -> str:
        """Return a short hash of the mapping, which detects that the database was set up for another mapping."""
        # Unused fields are left out, so an upgrade that adds a field does not change the hash.
        unused: dict[str, Any] = {
            noun: {
                field
                for field in type(getattr(self, noun)).model_fields
                if field != "table" and getattr(getattr(self, noun), field) is None
            }
            for noun in NOUNS
        }
        unused |= {name: True for name in ("time_zone",) if getattr(self, name) is None}
        return hashlib.sha256(self.model_dump_json(exclude=unused).encode()).hexdigest()[:16]

    def has_plan_of(self, field: str) -> bool:
        """Return whether the host has the plans that a plan key references; True for any other field."""
        table = {"token_plan_id": self.token_plan.table, "full_plan_id": self.full_plan.table}.get(field, field)
        return table is not None
