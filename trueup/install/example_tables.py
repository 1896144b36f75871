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
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from trueup.database.schema.columns import user_id_column_type
from trueup.errors import InvalidInputError
from trueup.host.fields import FIELDS, FLAG, ID, JSON, NOUNS, TABLES, TEXT, TIME, FieldEntry, Noun
from trueup.host.mapping import HostMapping
from trueup.host.setting_values import DEFAULT_SCHEMA, Compared, Expression, columns_of


def build_host_metadata(mapping: HostMapping) -> MetaData:
    """Return tables shaped like a typical Django host's, under the names of the mapping.

    Raises `InvalidInputError` where a row counts, or a subscription is active, by an expression: the columns that such
    an expression needs are not known.
    """
    metadata = MetaData()
    tables: dict[Noun, Table] = {}
    # A table comes after those that its foreign keys lead to.
    for noun in NOUNS:
        names = getattr(mapping, noun)
        if names.table is None:
            continue
        schema, _, name = names.table.rpartition(".")
        columns = [one for field in FIELDS[noun] for one in _columns(mapping, noun, field, tables)]
        if noun == "subscription":
            columns += _more_of_subscription({column.name for column in columns})
        tables[noun] = Table(name, metadata, *columns, schema=schema or DEFAULT_SCHEMA)
        index = TABLES[noun].entry.index
        if index is not None:
            Index(f"{name}_user_created", *(tables[noun].c[getattr(names, field)] for field in index))
    return metadata


def _columns(mapping: HostMapping, noun: Noun, field: str, tables: dict[Noun, Table]) -> list[Column[Any]]:
    """Return the columns that a setting names; none for a constant."""
    given, entry = getattr(getattr(mapping, noun), field), FIELDS[noun][field]
    if isinstance(given, Expression) and entry.kinds == FLAG:
        raise InvalidInputError(f"host.{noun}.{field}: no example table can be made for an expression")
    if isinstance(given, Compared):
        return [Column(given.column, String(50), nullable=False, server_default=given.equals[0])]
    if field == "id":
        return [_primary_key(given, _id_type(mapping, noun, entry), is_log=noun == "usage_log")]
    if entry.references is not None:
        if noun == "subscription" and entry.references not in ("user", *tables):
            return []  # no such plans
        keys = []
        if entry.references in tables:
            leads_to = tables[entry.references].c[getattr(mapping, entry.references).id]
            keys.append(ForeignKey(leads_to, deferrable=True, initially="DEFERRED"))  # like Django's
        id_type = _id_type(mapping, noun, entry)
        return [Column(given, id_type, *keys, nullable=entry.nullable, unique=entry.unique or None)]
    default = None if entry.default is None else text(entry.default)
    return [
        Column(name, _type(entry), nullable=entry.nullable, unique=entry.unique or None, server_default=default)
        for name in columns_of(given)
    ]


def _primary_key(name: str, id_type: Any, *, is_log: bool) -> Column[Any]:
    """The ids are numbers that the database draws; those of users may be others, and the log draws them too."""
    if isinstance(id_type, BigInteger):
        return Column(name, id_type, Identity(), primary_key=True)
    return Column(name, id_type, primary_key=True, server_default=text("gen_random_uuid()") if is_log else None)


def _id_type(mapping: HostMapping, noun: Noun, entry: FieldEntry) -> Any:
    if entry.references == "user" or (entry.references is None and noun == "user"):
        return user_id_column_type(mapping.user_id_type)
    return user_id_column_type(mapping.usage_log_id_type if noun == "usage_log" else "bigint")


def _type(entry: FieldEntry) -> Any:
    if entry.kinds in (TEXT, ID):
        return Text() if entry.length is None else String(entry.length)
    return {FLAG: Boolean(), TIME: DateTime(timezone=True), JSON: JSONB()}.get(entry.kinds, Integer())


def _more_of_subscription(there: set[str]) -> list[Column[Any]]:
    """Return what a typical host keeps besides. `there`: a host that says by a status what is active has that."""
    status = Column("status", String(20), nullable=False, server_default=text("'active'"))
    return [
        *([] if "status" in there else [status]),
        Column("trial_end", DateTime(timezone=True)),
        Column("cancel_at_period_end", Boolean, nullable=False, server_default=text("false")),
        Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    ]
