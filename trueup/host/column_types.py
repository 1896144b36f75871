"""What types the host's columns have, and which trueup can count and write by."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, text

from trueup.host.mapping import NOUNS, HostMapping, quote_table

_NUMBERS = frozenset({"smallint", "integer", "bigint"})
_TEXTS = frozenset({"text", "character varying", "character"})
_IDS = {"bigint": _NUMBERS, "uuid": frozenset({"uuid"}), "text": _TEXTS}
_LOCAL_TIME = "timestamp without time zone"
_TIME = frozenset({"timestamp with time zone", _LOCAL_TIME})
_FLAG = frozenset({"boolean"})
_USER_IDS = ("user.id", "subscription.user_id", "usage_log.user_id", "payment.user_id")
# What a column must be, by its place in the mapping; ids of users and log rows are as the mapping says.
_TYPES = {
    "token_plan.tokens_included": _NUMBERS,
    "full_plan.tokens_included": _NUMBERS,
    "subscription.start_date": _TIME,
    "subscription.end_date": _TIME,
    "subscription.tokens_remaining": _NUMBERS,
    "subscription.is_active": _FLAG,
    "subscription.tokens_included": _NUMBERS,
    "usage_log.prompt_tokens": _NUMBERS,
    "usage_log.completion_tokens": _NUMBERS,
    "usage_log.total_tokens": _NUMBERS,
    "usage_log.response_time_ms": _NUMBERS | {"numeric", "real", "double precision"},
    "usage_log.success": _FLAG,
    "usage_log.metadata": frozenset({"jsonb"}),
    "usage_log.created_at": _TIME,
    "token_usage.used_tokens": _NUMBERS,
    "token_usage.usage_date": _TIME,
    "payment.payment_date": _TIME,
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A mapped column as the catalog has it. `field`: its place in the mapping, "usage_log.total_tokens", say."""

    field: str
    table: str
    name: str
    type: str


@dataclass(frozen=True, kw_only=True)
class WrongType:
    """A column that can't be what it is mapped as, and what to do about it."""

    column: Column
    what: str
    remedy: str


def wrong_types(columns: Iterable[Column], mapping: HostMapping) -> Iterator[WrongType]:
    """Yield those of the mapped columns that could not be counted, compared or written as the mapping says."""
    for column in columns:
        wanted = _wanted(mapping, column.field)
        if wanted and column.type not in wanted:
            what = f"{column.table}.{column.name} is {column.type}, where trueup needs {' or '.join(sorted(wanted))}."
            yield WrongType(column=column, what=what, remedy=_remedy(column.field))


def local_times(columns: Iterable[Column], mapping: HostMapping) -> Iterator[Column]:
    """Yield those of the mapped columns that are times without a zone, which are read as UTC."""
    for column in columns:
        if _wanted(mapping, column.field) is _TIME and column.type == _LOCAL_TIME:
            yield column


def _remedy(field: str) -> str:
    if field in _USER_IDS:
        return f"Map another column as host.{field}, or correct host.user_id_type."
    if field == "usage_log.metadata":
        return f"Map another column as host.{field}, or none: {field.partition('.')[2]} = {{value = {{}}}}."
    return f"Map another column as host.{field}, or give this one such a type."


def mapped_columns(connection: Connection, mapping: HostMapping) -> list[Column]:
    """Return the columns that are mapped by their names, as far as they are there."""
    wanted = [
        (f"{noun}.{field}", getattr(mapping, noun).table, name)
        for noun in NOUNS
        for field, name in mapping.columns(noun)
        # Of what type an expression's columns are is the expression's matter.
        if getattr(getattr(mapping, noun), field) == name
    ]
    rows = connection.execute(
        text(
            """
            SELECT w.field, w.name AS table, w.column AS name, (
                       WITH RECURSIVE kind (id, base) AS (
                           SELECT t.oid, t.typbasetype
                           UNION ALL
                           SELECT b.oid, b.typbasetype FROM kind k JOIN pg_type b ON b.oid = k.base)
                       SELECT format_type(k.id, NULL) FROM kind k WHERE k.base = 0) AS type
            FROM unnest(CAST(:fields AS text[]), CAST(:names AS text[]), CAST(:quoted AS text[]),
                        CAST(:columns AS text[])) WITH ORDINALITY AS w (field, name, quoted, "column", place)
            JOIN pg_attribute a ON a.attrelid = to_regclass(w.quoted) AND a.attname = w.column AND a.attnum > 0
            JOIN pg_type t ON t.oid = a.atttypid
            ORDER BY w.place
            """
        ),
        {
            "fields": [field for field, _, _ in wanted],
            "names": [table for _, table, _ in wanted],
            "quoted": [quote_table(table) for _, table, _ in wanted],
            "columns": [column for _, _, column in wanted],
        },
    )
    return [Column(**row) for row in rows.mappings()]


def _wanted(mapping: HostMapping, field: str) -> frozenset[str]:
    if field in _USER_IDS:
        return _IDS[mapping.user_id_type]
    return _TYPES.get(field, frozenset())
