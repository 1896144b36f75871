"""The host's tables as the mapping names them: made for the embedded stack and for tests.

In production the host owns these tables; trueup reads them, adds rows to the usage log, and repairs one column.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from trueup.database.schema.columns import user_id_column_type
from trueup.errors import InvalidInputError
from trueup.host.columns import Compared, Expression, columns_of
from trueup.host.mapping import HostMapping


def build_host_metadata(mapping: HostMapping) -> MetaData:
    """Return tables shaped like a typical Django host's, under the names of the mapping.

    Raises `InvalidInputError` where a row counts, or a subscription is active, by an expression: nobody knows what its
    columns are.
    """
    metadata = MetaData()
    user = _user_table(metadata, mapping)
    token_plan = _plan_table(metadata, mapping.token_plan)
    full_plan = _plan_table(
        metadata, mapping.full_plan, *_made(mapping.full_plan.duration_days, Integer, nullable=False)
    )
    subscription = _subscription_table(metadata, mapping, user, token_plan, full_plan)
    _usage_log_table(metadata, mapping, user)
    if mapping.token_usage.table is not None:
        _token_usage_table(metadata, mapping, mapping.token_usage.table, subscription)
    if mapping.payment.table is not None:
        _payment_table(metadata, mapping, mapping.payment.table, user, subscription, token_plan, full_plan)
    return metadata


def _table(metadata: MetaData, name: str, *columns: Any) -> Table:
    schema, _, table = name.rpartition(".")
    return Table(table, metadata, *columns, schema=schema or None)


def _made(name: Any, kind: Any, **options: Any) -> list[Column[Any]]:
    """Return the column, if the mapping names one."""
    return [Column(name, kind, **options)] if isinstance(name, str) else []


def _foreign_key(table: Table | None, key: str) -> list[ForeignKey]:
    """Like Django's, which are checked at commit. None without the table."""
    return [] if table is None else [ForeignKey(table.c[key], deferrable=True, initially="DEFERRED")]


def _user_table(metadata: MetaData, mapping: HostMapping) -> Table | None:
    names = mapping.user
    if names.table is None:
        return None
    return _table(
        metadata,
        names.table,
        Column(names.id, user_id_column_type(mapping.user_id_type), primary_key=True),
        *_made(names.username, String(150), nullable=False, unique=True),
        *_made(names.email, String(254), nullable=False),
    )


def _plan_table(metadata: MetaData, names: Any, *more: Column[Any]) -> Table | None:
    if names.table is None:
        return None
    return _table(
        metadata,
        names.table,
        Column(names.id, BigInteger, primary_key=True),
        *_made(names.name, String(100), nullable=False),
        Column(names.tokens_included, Integer, nullable=False),
        *more,
        *_made(names.is_active, Boolean, nullable=False, server_default=text("true")),
    )


def _subscription_table(
    metadata: MetaData, mapping: HostMapping, user: Table | None, token_plan: Table | None, full_plan: Table | None
) -> Table:
    names = mapping.subscription
    if isinstance(names.is_active, Expression):
        raise InvalidInputError("host.subscription.is_active: no example table can be made for an expression")
    # A host that says it by a status has that column; the others have one that tells nothing.
    status = _compared(names.is_active)
    if "status" not in {column.name for column in status}:
        status.append(Column("status", String(20), nullable=False, server_default=text("'active'")))

    def plan(column: str, table: Table | None, key: str) -> list[Column[Any]]:
        return [] if table is None else [Column(column, BigInteger, *_foreign_key(table, key))]

    return _table(
        metadata,
        names.table,
        Column(names.id, BigInteger, primary_key=True),
        Column(
            names.user_id,
            user_id_column_type(mapping.user_id_type),
            *_foreign_key(user, mapping.user.id),
            nullable=False,
            unique=True,
        ),
        *plan(names.token_plan_id, token_plan, mapping.token_plan.id),
        *plan(names.full_plan_id, full_plan, mapping.full_plan.id),
        *(Column(column, Integer) for column in columns_of(names.tokens_included)),
        Column(names.start_date, DateTime(timezone=True), nullable=False),
        *_made(names.end_date, DateTime(timezone=True)),
        # Nullable, though Django's default is not: hosts are found where it is null.
        Column(names.tokens_remaining, Integer),
        *_made(names.is_active, Boolean, nullable=False, server_default=text("true")),
        *status,
        Column("trial_end", DateTime(timezone=True)),
        Column("cancel_at_period_end", Boolean, nullable=False, server_default=text("false")),
        Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    )


def _log_id(mapping: HostMapping) -> Column[Any]:
    if mapping.usage_log_id_type == "bigint":
        return Column(mapping.usage_log.id, BigInteger, Identity(), primary_key=True)
    id_type: Any = Uuid() if mapping.usage_log_id_type == "uuid" else Text()
    return Column(mapping.usage_log.id, id_type, primary_key=True, server_default=text("gen_random_uuid()"))


def _usage_log_table(metadata: MetaData, mapping: HostMapping, user: Table | None) -> None:
    names = mapping.usage_log
    if isinstance(names.counts, Expression):
        raise InvalidInputError("host.usage_log.counts: no example table can be made for an expression")
    log = _table(
        metadata,
        names.table,
        _log_id(mapping),
        Column(
            names.user_id,
            user_id_column_type(mapping.user_id_type),
            *_foreign_key(user, mapping.user.id),
            nullable=False,
        ),
        *_made(names.section, String(50), nullable=False),
        *_made(names.prompt_tokens, Integer, nullable=False, server_default=text("0")),
        *_made(names.completion_tokens, Integer, nullable=False, server_default=text("0")),
        Column(names.total_tokens, Integer, nullable=False, server_default=text("0")),
        *_made(names.response_time_ms, Integer, nullable=False, server_default=text("0")),
        *_made(names.success, Boolean, nullable=False, server_default=text("true")),
        *_made(names.model_name, String(100), nullable=False, server_default=text("''")),
        Column(names.error_message, Text),
        *_made(names.metadata, JSONB, nullable=False, server_default=text("'{}'")),
        Column(names.created_at, DateTime(timezone=True), nullable=False, server_default=func.now()),
        *_compared(names.counts),
    )
    Index(f"{log.name}_user_created", log.c[names.user_id], log.c[names.created_at])


def _compared(given: object) -> list[Column[Any]]:
    if not isinstance(given, Compared):
        return []
    return [Column(given.column, String(50), nullable=False, server_default=given.equals[0])]


def _token_usage_table(metadata: MetaData, mapping: HostMapping, name: str, subscription: Table) -> None:
    names = mapping.token_usage
    _table(
        metadata,
        name,
        Column(names.id, BigInteger, Identity(), primary_key=True),
        Column(
            names.subscription_id,
            BigInteger,
            *_foreign_key(subscription, mapping.subscription.id),
            nullable=False,
            index=True,
        ),
        Column(names.used_tokens, Integer, nullable=False),
        Column(names.usage_date, DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column(names.description, String(255), nullable=False, server_default=text("''")),
    )


def _payment_table(
    metadata: MetaData,
    mapping: HostMapping,
    name: str,
    user: Table | None,
    subscription: Table,
    token_plan: Table | None,
    full_plan: Table | None,
) -> None:
    names = mapping.payment
    _table(
        metadata,
        name,
        Column(names.id, BigInteger, Identity(), primary_key=True),
        Column(
            names.user_id,
            user_id_column_type(mapping.user_id_type),
            *_foreign_key(user, mapping.user.id),
            nullable=False,
            index=True,
        ),
        Column(names.subscription_id, BigInteger, *_foreign_key(subscription, mapping.subscription.id)),
        Column(names.token_plan_id, BigInteger, *_foreign_key(token_plan, mapping.token_plan.id)),
        Column(names.full_plan_id, BigInteger, *_foreign_key(full_plan, mapping.full_plan.id)),
        Column(names.status, String(20), nullable=False),
        Column(names.payment_date, DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column(names.transaction_id, String(100)),
    )
