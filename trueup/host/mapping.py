"""Where the host keeps its users, plans, subscriptions and AI usage log: table and column names.

The defaults are those of a Django application. A table may be qualified by its schema ("public.billing_subscription").
Some columns may be missing: what stands for them then is said in `trueup.host.setting_values`.
"""

import hashlib
from typing import Annotated, Self

from pydantic import BeforeValidator, model_validator
from sqlalchemy import TextClause, text

from trueup.host.fields import (
    FIELDS,
    NOUNS,
    TABLES,
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
from trueup.host.setting_values import (
    Compared,
    Constant,
    Given,
    Table,
    columns_of,
    quote_identifier,
    quote_literal,
    quote_table,
    sql_of,
)
from trueup.host.sql_templates import fill, named_fields

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
    "fields_named_in",
    "quote_identifier",
    "quote_table",
    "render_sql",
    "render_statement",
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
            if self._plan_of(field) is not None
            for column in columns_of(getattr(part, field))
        ]

    def counted_columns(self) -> list[str]:
        """Return the log's columns that say what is used, by whom and when."""
        fields = FIELDS["usage_log"]
        return list(dict.fromkeys(column for field, column in self.columns("usage_log") if fields[field].counted))

    def has(self, name: str) -> bool:
        """Return whether the host has it, in whatever form; for templates."""
        noun, _, field = name.partition(".")
        given = getattr(getattr(self, noun), field or "table")
        return given is not None and (field == "tokens_included" or not isinstance(given, Constant))

    def stores(self, name: str) -> bool:
        """Return whether the host has a column for it; for templates."""
        noun, _, field = name.partition(".")
        return isinstance(getattr(getattr(self, noun), field), str)

    def sql(self, name: str, alias: str | None) -> str:
        """Return a name as SQL; for templates. Raises KeyError for one that there is none of.

        `usage_log.success` is whether a row counts, however the host says that. `usage_log.written` is what trueup's
        rows consist of: the columns, or with an alias their values in its row, which has all fields.
        """
        noun, _, field = name.partition(".")
        if name in ("user_id_type", "usage_log_id_type"):
            return str(getattr(self, name))
        if name == "usage_log.written":
            return self._written(alias)
        if name == "usage_log.counted":
            return ", ".join(map(quote_literal, self.counted_columns()))
        if name == "usage_log.tells_failure":
            return str(self.usage_log.tells_failure).lower()
        known = next((one for one in NOUNS if one == noun), None)
        if known is None or (field or "table") not in TABLES[known].model_fields:
            raise KeyError(name)
        part = getattr(self, known)
        if not field:
            return quote_table(part.table) if part.table is not None else self._nobody(noun)
        if field == "completed_status":
            return str(part.completed_status)
        if self._plan_of(field) is None:
            return "CAST(NULL AS text)"
        given: Given = getattr(part, field)
        if name == "usage_log.success" and part.counts is not None:
            given = part.counts
        if part.table is None:
            given = field
        return sql_of(given, alias, FIELDS[known][field].sql_type)

    def fingerprint(self) -> str:
        """Return a short hash of the whole mapping, to notice that the database was set up for another one."""
        # A field that came later is left out where it is not used: an upgrade alone makes no other mapping.
        unused: dict[str, set[str]] = {
            noun: {field for field in FIELDS[noun] if getattr(getattr(self, noun), field) is None} for noun in NOUNS
        }
        return hashlib.sha256(self.model_dump_json(exclude=unused).encode()).hexdigest()[:16]

    def _plan_of(self, field: str) -> Table | None:
        """Return the table that a key to plans leads to, None: it is not there. For other fields: not None."""
        return {"token_plan_id": self.token_plan.table, "full_plan_id": self.full_plan.table}.get(field, field)

    def _nobody(self, noun: str) -> str:
        """Return what stands for a table that is not there."""
        if noun in ("token_plan", "full_plan"):
            nulls = (f"CAST(NULL AS {entry.sql_type}) AS {field}" for field, entry in FIELDS["full_plan"].items())
            return f"(SELECT {', '.join(nulls)} WHERE false)"
        if noun != "user":
            raise KeyError(noun)
        return (
            f"(SELECT s.{quote_identifier(self.subscription.user_id)} AS id, CAST(NULL AS text) AS username, "
            f"CAST(NULL AS text) AS email FROM {quote_table(self.subscription.table)} s)"
        )

    def _written(self, alias: str | None) -> str:
        log = self.usage_log
        if alias is None:
            return ", ".join(map(quote_identifier, log.written))
        values = [f"{alias}.{field}" for field in log.written_fields]
        if isinstance(log.counts, Compared):
            # Into whatever type the column has.
            name, succeeded = quote_literal(log.counts.column), quote_literal(log.counts.equals[0])
            failed = quote_literal(log.counts.failed) if log.counts.failed is not None else succeeded
            values.append(
                f"(jsonb_populate_record(CAST(NULL AS {quote_table(log.table)}), jsonb_build_object({name}, "
                f"CASE WHEN {alias}.success THEN {succeeded} ELSE {failed} END))).{quote_identifier(log.counts.column)}"
            )
        return ", ".join(values)


def render_sql(template: str, mapping: HostMapping) -> str:
    """Fill an SQL template in; `sql_templates` says how it is written. Raises KeyError on an unknown name."""
    return fill(template, mapping)


def render_statement(template: str, mapping: HostMapping) -> TextClause:
    """Render an SQL template as a statement with `:parameters`; a colon in a name of the host's begins none.

    Raises KeyError on an unknown name.
    """
    return text(fill(template, mapping, escape=lambda name: name.replace(":", "\\:")))


def fields_named_in(template: str, mapping: HostMapping) -> list[tuple[Noun, str]]:
    """Return what a template reads of the host's tables, as (noun, field), each once."""
    return [(noun, field) for name, field in named_fields(template, mapping) for noun in NOUNS if noun == name]
