"""The host's tables as the mapping names them: made for the embedded stack and for tests, looked up elsewhere.

In production the host owns these tables; trueup reads them, adds rows to the usage log, and repairs one column.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
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

from billing.mapping import HostMapping, PaymentTable, UsageLogTable, quote_table
from billing.schema.columns import user_id_column_type


def build_host_metadata(mapping: HostMapping) -> MetaData:
    """Return tables shaped like a typical Django host's, under the names of the mapping."""
    metadata = MetaData()
    user = _table(
        metadata,
        mapping.user.table,
        Column(mapping.user.id, user_id_column_type(mapping.user_id_type), primary_key=True),
        Column(mapping.user.username, String(150), nullable=False, unique=True),
        Column(mapping.user.email, String(254), nullable=False),
    )
    token_plan = _plan_table(metadata, mapping.token_plan)
    full_plan = _plan_table(
        metadata,
        mapping.full_plan,
        Column(mapping.full_plan.duration_days, Integer, nullable=False),
    )
    subscription = _subscription_table(metadata, mapping, user, token_plan, full_plan)
    _usage_log_table(metadata, mapping, user)
    if mapping.token_usage.table is not None:
        _token_usage_table(metadata, mapping, mapping.token_usage.table, subscription)
    if mapping.payment.table is not None:
        _payment_table(metadata, mapping, mapping.payment.table, user, subscription, token_plan, full_plan)
    return metadata


def missing_host_tables(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped tables that the database does not have."""
    nouns = (
        mapping.user,
        mapping.token_plan,
        mapping.full_plan,
        mapping.subscription,
        mapping.usage_log,
        mapping.token_usage,
        mapping.payment,
    )
    tables = [noun.table for noun in nouns if noun.table is not None]
    found = connection.execute(
        text(
            "SELECT name FROM unnest(CAST(:names AS text[]), CAST(:quoted AS text[])) AS t (name, quoted) "
            "WHERE to_regclass(quoted) IS NULL"
        ),
        {"names": tables, "quoted": [quote_table(table) for table in tables]},
    )
    return list(found.scalars())


def missing_host_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the mapped columns, of those that trueup uses, that their tables do not have, as TABLE.COLUMN."""
    plan_columns = {"id", "tokens_included"}
    nouns: tuple[tuple[Any, set[str] | None], ...] = (
        (mapping.token_plan, plan_columns),
        (mapping.full_plan, plan_columns | ({"duration_days"} if mapping.payment.table else set())),
        (mapping.subscription, None),
        (mapping.usage_log, set(UsageLogTable.model_fields) - {"error_message"}),
        (mapping.token_usage, {"id", "subscription_id", "used_tokens", "usage_date"}),
        (mapping.payment, set(PaymentTable.model_fields) - {"subscription_id"}),
    )
    wanted = [
        (noun.table, column)
        for noun, used in nouns
        if noun.table is not None
        for field, column in noun.model_dump(exclude={"table", "completed_status"}).items()
        if used is None or field in used
    ]
    found = connection.execute(
        text(
            """
            SELECT name || '.' || wanted
            FROM unnest(CAST(:names AS text[]), CAST(:quoted AS text[]), CAST(:columns AS text[]))
                WITH ORDINALITY AS t (name, quoted, wanted, place)
            WHERE NOT EXISTS (SELECT FROM pg_attribute a
                              WHERE a.attrelid = to_regclass(quoted) AND a.attname = wanted AND a.attnum > 0)
            ORDER BY place
            """
        ),
        {
            "names": [table for table, _ in wanted],
            "quoted": [quote_table(table) for table, _ in wanted],
            "columns": [column for _, column in wanted],
        },
    )
    return list(found.scalars())


def demanded_log_columns(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return the log's columns that each row must fill and that trueup, knowing nothing of them, could not."""
    log = mapping.usage_log
    found = connection.execute(
        text(
            """
            SELECT attname FROM pg_attribute
            WHERE attrelid = to_regclass(:quoted) AND attnum > 0 AND NOT attisdropped
              AND attnotnull AND NOT atthasdef AND attidentity = '' AND attname <> ALL (CAST(:known AS text[]))
            ORDER BY attnum
            """
        ),
        {"quoted": quote_table(log.table), "known": list(log.model_dump(exclude={"table", "error_message"}).values())},
    )
    return [f"{log.table}.{column}" for column in found.scalars()]


def tables_without_triggers(connection: Connection, mapping: HostMapping) -> list[str]:
    """Return what of the usage log and the subscriptions is no table of this database, such as a view."""
    tables = [mapping.usage_log.table, mapping.subscription.table]
    found = connection.execute(
        text(
            "SELECT name FROM unnest(CAST(:names AS text[]), CAST(:quoted AS text[])) AS t (name, quoted) "
            "JOIN pg_class c ON c.oid = to_regclass(quoted) WHERE c.relkind NOT IN ('r', 'p')"
        ),
        {"names": tables, "quoted": [quote_table(table) for table in tables]},
    )
    return list(found.scalars())


def _table(metadata: MetaData, name: str, *columns: Any) -> Table:
    schema, _, table = name.rpartition(".")
    return Table(table, metadata, *columns, schema=schema or None)


def _foreign_key(table: Table, key: str) -> ForeignKey:
    """Like Django's, which are checked at commit."""
    return ForeignKey(table.c[key], deferrable=True, initially="DEFERRED")


def _plan_table(metadata: MetaData, names: Any, *more: Column[Any]) -> Table:
    return _table(
        metadata,
        names.table,
        Column(names.id, BigInteger, primary_key=True),
        Column(names.name, String(100), nullable=False),
        Column(names.tokens_included, Integer, nullable=False),
        *more,
        Column(names.is_active, Boolean, nullable=False, server_default=text("true")),
    )


def _subscription_table(
    metadata: MetaData, mapping: HostMapping, user: Table, token_plan: Table, full_plan: Table
) -> Table:
    names = mapping.subscription

    def plan(column: str, table: Table, key: str) -> Column[Any]:
        return Column(column, BigInteger, _foreign_key(table, key))

    return _table(
        metadata,
        names.table,
        Column(names.id, BigInteger, primary_key=True),
        Column(
            names.user_id,
            user_id_column_type(mapping.user_id_type),
            _foreign_key(user, mapping.user.id),
            nullable=False,
            unique=True,
        ),
        plan(names.token_plan_id, token_plan, mapping.token_plan.id),
        plan(names.full_plan_id, full_plan, mapping.full_plan.id),
        Column(names.start_date, DateTime(timezone=True), nullable=False),
        Column(names.end_date, DateTime(timezone=True)),
        # Nullable, though Django's default is not: hosts are found where it is null.
        Column(names.tokens_remaining, Integer),
        Column(names.is_active, Boolean, nullable=False, server_default=text("true")),
        Column("status", String(20), nullable=False, server_default=text("'active'")),
        Column("trial_end", DateTime(timezone=True)),
        Column("cancel_at_period_end", Boolean, nullable=False, server_default=text("false")),
        Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    )


def _usage_log_table(metadata: MetaData, mapping: HostMapping, user: Table) -> None:
    names = mapping.usage_log
    id_type: Any = Uuid() if mapping.usage_log_id_type == "uuid" else Text()
    log = _table(
        metadata,
        names.table,
        Column(names.id, id_type, primary_key=True, server_default=text("gen_random_uuid()")),
        Column(
            names.user_id,
            user_id_column_type(mapping.user_id_type),
            _foreign_key(user, mapping.user.id),
            nullable=False,
        ),
        Column(names.section, String(50), nullable=False),
        Column(names.prompt_tokens, Integer, nullable=False, server_default=text("0")),
        Column(names.completion_tokens, Integer, nullable=False, server_default=text("0")),
        Column(names.total_tokens, Integer, nullable=False, server_default=text("0")),
        Column(names.response_time_ms, Integer, nullable=False, server_default=text("0")),
        Column(names.success, Boolean, nullable=False, server_default=text("true")),
        Column(names.model_name, String(100), nullable=False, server_default=text("''")),
        Column(names.error_message, Text),
        Column(names.metadata, JSONB, nullable=False, server_default=text("'{}'")),
        Column(names.created_at, DateTime(timezone=True), nullable=False, server_default=func.now()),
    )
    Index(f"{log.name}_user_created", log.c[names.user_id], log.c[names.created_at])


def _token_usage_table(metadata: MetaData, mapping: HostMapping, name: str, subscription: Table) -> None:
    names = mapping.token_usage
    _table(
        metadata,
        name,
        Column(names.id, BigInteger, Identity(), primary_key=True),
        Column(
            names.subscription_id,
            BigInteger,
            _foreign_key(subscription, mapping.subscription.id),
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
    user: Table,
    subscription: Table,
    token_plan: Table,
    full_plan: Table,
) -> None:
    names = mapping.payment
    _table(
        metadata,
        name,
        Column(names.id, BigInteger, Identity(), primary_key=True),
        Column(
            names.user_id,
            user_id_column_type(mapping.user_id_type),
            _foreign_key(user, mapping.user.id),
            nullable=False,
            index=True,
        ),
        Column(names.subscription_id, BigInteger, _foreign_key(subscription, mapping.subscription.id)),
        Column(names.token_plan_id, BigInteger, _foreign_key(token_plan, mapping.token_plan.id)),
        Column(names.full_plan_id, BigInteger, _foreign_key(full_plan, mapping.full_plan.id)),
        Column(names.status, String(20), nullable=False),
        Column(names.payment_date, DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column(names.transaction_id, String(100)),
    )
