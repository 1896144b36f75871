"""Example host tables under the mapping's names, for the embedded stack and for tests.

In production the host owns these tables. trueup reads them, adds rows to the usage log, and corrects the counter.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from trueup.database.schema.columns import user_id_column_type
from trueup.errors import InvalidInputError
from trueup.host.fields import FIELDS, FLAG, ID, JSON, NOUNS, TABLES, TEXT, TIME, FieldEntry, Noun
from trueup.host.mapping import HostMapping
from trueup.host.setting_values import DEFAULT_SCHEMA, Compared, Expression, columns_of


def build_host_metadata(mapping: HostMapping) -> sa.MetaData:
    """Return tables like a typical Django host's, under the mapping's names.

    Raises `InvalidInputError` if an expression of the mapping says whether a row counts or a subscription is active:
    its columns are not known.
    """
    metadata = sa.MetaData()
    tables: dict[Noun, sa.Table] = {}
    # NOUNS lists a table after the tables that its foreign keys reference.
    for noun in NOUNS:
        names = getattr(mapping, noun)
        if names.table is None:
            continue
        schema, _, name = names.table.rpartition(".")
        columns = [one for field in FIELDS[noun] for one in _columns(mapping, noun, field, tables)]
        if noun == "subscription":
            columns += _extra_subscription_columns({column.name for column in columns})
        tables[noun] = sa.Table(name, metadata, *columns, schema=schema or DEFAULT_SCHEMA)
        index = TABLES[noun].entry.index
        if index is not None:
            sa.Index(f"{name}_user_created", *(tables[noun].c[getattr(names, field)] for field in index))
    return metadata


def _columns(mapping: HostMapping, noun: Noun, field: str, tables: dict[Noun, sa.Table]) -> list[sa.Column[Any]]:
    """Return the columns for a setting; none for a constant."""
    given, entry = getattr(getattr(mapping, noun), field), FIELDS[noun][field]
    if isinstance(given, Expression) and entry.kinds == FLAG:
        raise InvalidInputError(
            f"host.{noun}.{field}: trueup can't create an example table for an expression. Map a column"
        )
    if isinstance(given, Compared):
        return [sa.Column(given.column, sa.String(50), nullable=False, server_default=given.equals[0])]
    if field == "id":
        return [_primary_key(given, _id_type(mapping, noun, entry), is_log=noun == "usage_log")]
    if entry.references is not None:
        if noun == "subscription" and entry.references not in ("user", *tables):
            return []  # the host has no such plans
        keys = []
        if entry.references in tables:
            target = tables[entry.references].c[getattr(mapping, entry.references).id]
            keys.append(sa.ForeignKey(target, deferrable=True, initially="DEFERRED"))  # like Django's
        id_type = _id_type(mapping, noun, entry)
        return [sa.Column(given, id_type, *keys, nullable=entry.nullable, unique=entry.unique or None)]
    default = None if entry.default is None else sa.text(entry.default)
    return [
        sa.Column(name, _type(entry), nullable=entry.nullable, unique=entry.unique or None, server_default=default)
        for name in columns_of(given)
    ]


def _primary_key(name: str, id_type: Any, *, is_log: bool) -> sa.Column[Any]:
    """Return an identity column for integers. Other types are for users and the log; the log generates its ids."""
    if isinstance(id_type, sa.BigInteger):
        return sa.Column(name, id_type, sa.Identity(), primary_key=True)
    return sa.Column(name, id_type, primary_key=True, server_default=sa.text("gen_random_uuid()") if is_log else None)


def _id_type(mapping: HostMapping, noun: Noun, entry: FieldEntry) -> Any:
    if entry.references == "user" or (entry.references is None and noun == "user"):
        return user_id_column_type(mapping.user_id_type)
    return user_id_column_type(mapping.usage_log_id_type if noun == "usage_log" else "bigint")


def _type(entry: FieldEntry) -> Any:
    if entry.kinds in (TEXT, ID):
        return sa.Text() if entry.length is None else sa.String(entry.length)
    return {FLAG: sa.Boolean(), TIME: sa.DateTime(timezone=True), JSON: JSONB()}.get(entry.kinds, sa.Integer())


def _extra_subscription_columns(there: set[str]) -> list[sa.Column[Any]]:
    """Return further columns of a typical host. `there`: the mapped ones, which may include `status`."""
    status = sa.Column("status", sa.String(20), nullable=False, server_default=sa.text("'active'"))
    return [
        *([] if "status" in there else [status]),
        sa.Column("trial_end", sa.DateTime(timezone=True)),
        sa.Column("cancel_at_period_end", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    ]
