"""Where the host keeps its users, plans, subscriptions and AI usage log: table and column names.

The defaults are those of a Django application. All fields are names in the host's database, a table may be
qualified by its schema ("public.billing_subscription").
"""

import hashlib
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict
from sqlalchemy import TextClause, text

UserIdType = Literal["bigint", "uuid", "text"]
LogIdType = Literal["uuid", "text"]

_MAX_IDENTIFIER_BYTES = 63  # PostgreSQL's NAMEDATALEN - 1


def _check_identifier(name: str) -> str:
    if not name or "\x00" in name or len(name.encode()) > _MAX_IDENTIFIER_BYTES:
        raise ValueError(f"{name!r} is no PostgreSQL name: give 1 to {_MAX_IDENTIFIER_BYTES} bytes")
    if "$$" in name:
        raise ValueError(f"{name!r} contains $$, which would end the bodies of trueup's functions")
    return name


def _check_table(name: str) -> str:
    if name.count(".") > 1:
        raise ValueError(f"{name!r} is no table name: give TABLE or SCHEMA.TABLE")
    for part in name.split("."):
        _check_identifier(part)
    return name


def _check_value(value: str) -> str:
    if "\x00" in value or "$$" in value:
        raise ValueError(f"{value!r} contains NUL or $$, which would end the bodies of trueup's functions")
    return value


Column = Annotated[str, AfterValidator(_check_identifier)]
Value = Annotated[str, AfterValidator(_check_value)]
Table = Annotated[str, AfterValidator(_check_table)]


def quote_identifier(name: str) -> str:
    """Quote a column name for use in SQL text."""
    return '"' + name.replace('"', '""') + '"'


def quote_table(name: str) -> str:
    """Quote a table name, schema-qualified or not, for use in SQL text."""
    return ".".join(quote_identifier(part) for part in name.split("."))


class _Names(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UserTable(_Names):
    table: Table = "accounts_user"
    id: Column = "id"
    username: Column = "username"
    email: Column = "email"


class TokenPlanTable(_Names):
    table: Table = "billing_tokenplan"
    id: Column = "id"
    name: Column = "name"
    tokens_included: Column = "tokens_included"
    is_active: Column = "is_active"


class FullPlanTable(TokenPlanTable):
    table: Table = "billing_fullplan"
    duration_days: Column = "duration_days"


class SubscriptionTable(_Names):
    table: Table = "billing_subscription"
    id: Column = "id"
    user_id: Column = "user_id"
    token_plan_id: Column = "token_plan_id"
    full_plan_id: Column = "full_plan_id"
    start_date: Column = "start_date"
    end_date: Column = "end_date"
    tokens_remaining: Column = "tokens_remaining"
    is_active: Column = "is_active"


class UsageLogTable(_Names):
    table: Table = "ai_usage_log"
    id: Column = "id"
    user_id: Column = "user_id"
    section: Column = "section"
    prompt_tokens: Column = "prompt_tokens"
    completion_tokens: Column = "completion_tokens"
    total_tokens: Column = "total_tokens"
    response_time_ms: Column = "response_time_ms"
    success: Column = "success"
    model_name: Column = "model_name"
    error_message: Column = "error_message"
    metadata: Column = "metadata"
    created_at: Column = "created_at"


class TokenUsageTable(_Names):
    """Optional: one row for each decrement of the counter. `table` None: the host keeps no such rows."""

    table: Table | None = None
    id: Column = "id"
    subscription_id: Column = "subscription_id"
    used_tokens: Column = "used_tokens"
    usage_date: Column = "usage_date"
    description: Column = "description"


class PaymentTable(_Names):
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


class HostMapping(_Names):
    """Names of the host's tables and columns, and the type of its user ids."""

    user_id_type: UserIdType = "bigint"
    usage_log_id_type: LogIdType = "uuid"
    user: UserTable = UserTable()
    token_plan: TokenPlanTable = TokenPlanTable()
    full_plan: FullPlanTable = FullPlanTable()
    subscription: SubscriptionTable = SubscriptionTable()
    usage_log: UsageLogTable = UsageLogTable()
    token_usage: TokenUsageTable = TokenUsageTable()
    payment: PaymentTable = PaymentTable()

    def sql_names(self) -> dict[str, str]:
        """Return quoted names for SQL templates: `{{subscription}}`, `{{subscription.user_id}}`, …

        An optional table that is not mapped has no names. `{{literal payment.completed_status}}` is a value, and has no
        other form.
        """
        names: dict[str, str] = {"user_id_type": self.user_id_type, "usage_log_id_type": self.usage_log_id_type}
        for noun in ("user", "token_plan", "full_plan", "subscription", "usage_log", "token_usage", "payment"):
            if getattr(self, noun).table is None:
                continue
            for field, name in getattr(self, noun).model_dump(exclude={"completed_status"}).items():
                if field == "table":
                    names[noun] = quote_table(name)
                else:
                    names[f"{noun}.{field}"] = quote_identifier(name)
        if self.payment.table is not None:
            names["payment.completed_status"] = self.payment.completed_status
        return names

    def fingerprint(self) -> str:
        """Return a short hash of the whole mapping, to notice that the database was set up for another one."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


_PLACEHOLDER = re.compile(r"\{\{(literal )?([a-z_.]+)\}\}")


def render_sql(template: str, mapping: HostMapping) -> str:
    """Replace each `{{name}}` of an SQL template by the host's own, quoted, and `{{literal name}}` by that as a string.

    Raises KeyError on an unknown name.
    """
    return _render(template, mapping.sql_names())


def render_statement(template: str, mapping: HostMapping) -> TextClause:
    """Render an SQL template as a statement with `:parameters`; a colon in a name of the host's begins none.

    Raises KeyError on an unknown name.
    """
    names = {key: name.replace(":", "\\:") for key, name in mapping.sql_names().items()}
    return text(_render(template, names))


def _render(template: str, names: dict[str, str]) -> str:
    def replacement(match: re.Match[str]) -> str:
        name = names[match[2]]
        return "'" + name.replace("'", "''") + "'" if match[1] else name

    return _PLACEHOLDER.sub(replacement, template)
