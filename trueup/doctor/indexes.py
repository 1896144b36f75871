"""The indexes of the host's tables that trueup leans on."""

from collections.abc import Iterable, Iterator

from sqlalchemy import Connection, text

from trueup.doctor.findings import Finding, error, ok, warning
from trueup.host.catalog import column_names
from trueup.host.mapping import quote_identifier, quote_table
from trueup.settings.settings import Settings

# From so many rows on, a balance that is built without an index keeps its user waiting.
LARGE_LOG_ROWS = 10_000


def check_log_index(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield whether a user's rows since a time can be found in the log without reading it all."""
    log = settings.host.usage_log
    wanted = [log.user_id, log.created_at]
    if not set(wanted) <= set(column_names(connection, log.table)):
        return  # the mapping's check says so
    leading = connection.execute(_INDEXES, {"table": quote_table(log.table)}).all()
    if any(index.valid and index.columns[:2] == wanted for index in leading):
        yield ok("log_index", f"{log.table} has an index on ({', '.join(wanted)}).")
        return
    statement = text("SELECT reltuples FROM pg_class WHERE oid = to_regclass(:table)")
    rows = connection.execute(statement, {"table": quote_table(log.table)}).scalar_one()
    statements = _index_statements(connection, log.table, wanted)
    broken = [index.name for index in leading if not index.valid and index.columns[:2] == wanted]
    if broken:
        statements.insert(0, f"DROP INDEX CONCURRENTLY {broken[0]};")
    partly = any(index.valid and index.columns[:1] == wanted[:1] for index in leading)
    level = warning if partly or rows < LARGE_LOG_ROWS else error
    slow = "reads all rows of the user" if partly else "reads the whole log"
    yield level(
        "log_index",
        f"{log.table} has no usable index on ({', '.join(wanted)}): building a balance {slow}, under its lock.",
        f"Run: {' '.join(statements)}",
        statements=statements,
    )


def check_subscription_index(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield whether a user can have only one subscription, which every decision takes for granted."""
    names = settings.host.subscription
    table, column = quote_table(names.table), quote_identifier(names.user_id)
    if names.user_id not in column_names(connection, names.table):
        return  # the mapping's check says so
    indexes = connection.execute(_INDEXES, {"table": table})
    if any(index.valid and index.single and index.columns == [names.user_id] for index in indexes):
        yield ok("subscription_index", f"{names.table}.{names.user_id} is unique.")
        return
    double = connection.scalar(
        text(
            f"SELECT count(*) FROM (SELECT FROM {table} WHERE {column} IS NOT NULL "
            f"GROUP BY {column} HAVING count(*) > 1) AS t"
        )
    )
    statement = f"CREATE UNIQUE INDEX CONCURRENTLY ON {table} ({column});"
    if double:
        yield error(
            "subscription_index",
            f"{double} users have several rows in {names.table}, where trueup takes one for granted.",
            f"Remove or merge what is too many, then run: {statement}",
            users=double,
            statements=[statement],
        )
    else:
        yield warning(
            "subscription_index",
            f"Nothing keeps a user from having two rows in {names.table}; none has now.",
            f"Run: {statement}",
            users=0,
            statements=[statement],
        )


# Whole tables' indexes on plain columns; NULL stands for an expression.
_INDEXES = text(
    """
    SELECT CAST(i.indexrelid AS regclass)::text AS name, i.indisvalid AND i.indisready AS valid,
           i.indisunique AS single,
           ARRAY(SELECT CAST(a.attname AS text) FROM unnest(i.indkey) WITH ORDINALITY AS k (number, place)
                 LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
                 WHERE k.place <= i.indnkeyatts ORDER BY k.place) AS columns
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
    WHERE i.indrelid = to_regclass(:table) AND m.amname = 'btree' AND i.indpred IS NULL
    """.replace("::", r"\:\:")
)


def _index_statements(connection: Connection, table: str, columns: Iterable[str]) -> list[str]:
    """Return what makes the index while the host goes on writing.

    A partitioned table's last: it takes over those of its partitions, where it would else build each under a lock.
    """
    listed = ", ".join(map(quote_identifier, columns))
    leaves = connection.scalars(
        text(
            "SELECT CAST(t.relid AS text) FROM pg_partition_tree(to_regclass(:table)) t "
            "WHERE t.isleaf AND t.level > 0 ORDER BY 1"
        ),
        {"table": quote_table(table)},
    ).all()
    concurrently = [f"CREATE INDEX CONCURRENTLY ON {leaf} ({listed});" for leaf in leaves or [quote_table(table)]]
    return concurrently + ([f"CREATE INDEX ON {quote_table(table)} ({listed});"] if leaves else [])
