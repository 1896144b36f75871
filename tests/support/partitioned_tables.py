"""trueup's own tables, partitioned by a hash of the user: what docs/scaling.md describes."""

import re

from sqlalchemy import Connection, text

from trueup.database.schema.holds import ONE_OPEN_PER_TASK
from trueup.host.mapping import HostMapping
from trueup.install.install import install

# The tables that grow with the tasks and calls, and the balance. Each key begins with the user.
BY_USER = ("balance", "usage_delta", "hold", "charge", "call_intent", "owed_charge", "counter_entry")


def partition_by_user(connection: Connection, partitions: int) -> None:
    """Split trueup's large tables into so many partitions, in a transaction of the caller.

    No other session may use the tables meanwhile.
    """
    for table in BY_USER:
        _partition(connection, table, partitions)
    # The functions that used the tables' row types went with the old tables.
    install(connection, HostMapping(), with_host_tables=False)


def _partition(connection: Connection, table: str, partitions: int) -> None:
    [key] = connection.execute(
        text(
            "SELECT conname AS name, pg_get_constraintdef(oid) AS definition FROM pg_constraint "
            "WHERE conrelid = to_regclass(:table) AND contype = 'p'"
        ),
        {"table": f"trueup.{table}"},
    )
    indexes = list(
        connection.execute(
            text(
                "SELECT indexdef FROM pg_indexes "
                "WHERE schemaname = 'trueup' AND tablename = :table AND indexname <> :key"
            ),
            {"table": table, "key": key.name},
        ).scalars()
    )
    statements = [
        f"ALTER TABLE trueup.{table} RENAME TO old",
        f"CREATE TABLE trueup.{table} (LIKE trueup.old INCLUDING ALL EXCLUDING INDEXES) PARTITION BY HASH (user_id)",
        *(
            f"CREATE TABLE trueup.{table}_{number} PARTITION OF trueup.{table} "
            f"FOR VALUES WITH (MODULUS {partitions}, REMAINDER {number}) WITH (fillfactor = 50)"
            for number in range(partitions)
        ),
        f"INSERT INTO trueup.{table} OVERRIDING SYSTEM VALUE SELECT * FROM trueup.old",
        "DROP TABLE trueup.old CASCADE",
        f"ALTER TABLE trueup.{table} ADD CONSTRAINT {key.name} {key.definition}",
        *(_with_user(index) for index in indexes),
    ]
    for statement in statements:
        connection.exec_driver_sql(statement)


def _with_user(index: str) -> str:
    """Return the definition of an index with the user in its key, if it is unique: PostgreSQL demands that."""
    if ONE_OPEN_PER_TASK not in index:
        return index
    return re.sub(r"\(task_id, .*\) WHERE", "(user_id, task_id) WHERE", index, flags=re.DOTALL)
