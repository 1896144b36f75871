"""The rights that each role needs, read from the database's catalog and the mapping, and those that a role lacks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection, text

from trueup.database.schema import SCHEMA, own_table
from trueup.errors import MissingRightError
from trueup.host.catalog import column_names
from trueup.host.fields import NOUNS
from trueup.host.log_ids import log_id_sequence
from trueup.host.mapping import HostMapping, quote_identifier, quote_table
from trueup.host.partitions import log_tables

# What only migrating writes; the log's triggers do so with its owner's rights.
MIGRATED = frozenset({"alembic_version", "installation", "log_truncation"})
# But for what has become of the log: trueup.note_log().
_NOTED = ("column_versions", "log_files", "log_parents", "partitions")

Kind = Literal["schema", "table", "sequence", "function"]


@dataclass(frozen=True, kw_only=True)
class Right:
    """A right on an object, named as in SQL. `columns` empty: on the whole of it."""

    kind: Kind
    name: str
    privilege: str
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        columns = f" ({', '.join(map(quote_identifier, self.columns))})" if self.columns else ""
        return f"{self.privilege}{columns} ON {self.kind.upper()} {self.name}"


def migrate_rights(connection: Connection, mapping: HostMapping) -> list[Right]:
    """Return what the role that sets trueup up needs of the host, beside making or owning schema `trueup`."""
    tables = [*log_tables(connection, mapping), _qualified(connection, mapping.subscription.table)]
    return [
        *(Right(kind="table", name=table, privilege="TRIGGER") for table in tables),
        *_host_rights(connection, mapping, read_users=False, write=False),
    ]


def worker_rights(connection: Connection, mapping: HostMapping) -> list[Right]:
    """Return what the role of the workers, the API and the commands needs."""
    rights = [*_host_rights(connection, mapping, read_users=True, write=True), *_own_rights(connection)]
    sequence = log_id_sequence(connection, mapping)
    if sequence is not None:
        rights.append(Right(kind="sequence", name=sequence, privilege="USAGE"))
    passing = passing_tables()
    for table in _own_tables(connection):
        verbs = ["INSERT", "UPDATE", "DELETE"] if table in passing else ["INSERT", "UPDATE"]
        rights += [_on_own(table, verb) for verb in ([] if table in MIGRATED else verbs)]
        if table == "installation":
            rights.append(replace(_on_own(table, "UPDATE"), columns=_NOTED))
        if table == "log_truncation":
            rights.append(_on_own(table, "INSERT"))
    return rights


def readonly_rights(connection: Connection, mapping: HostMapping) -> list[Right]:
    """Return what the role of reports needs."""
    return [
        *_host_rights(connection, mapping, read_users=False, write=False),
        *(_without_secret(right, mapping) for right in _own_rights(connection)),
    ]


def _without_secret(right: Right, mapping: HostMapping) -> Right:
    """Return the right without the secret of trueup's marks: who reads it can hide log rows from the balances."""
    if right != _on_own("installation", "SELECT"):
        return right
    columns = own_table("installation", mapping.user_id_type).columns.keys()
    return replace(right, columns=tuple(name for name in columns if name != "mark_secret"))


@cache
def passing_tables() -> frozenset[str]:
    """Return the tables whose rows come and go: those of the code's own DELETEs.

    From all others nothing is ever deleted: what was held, charged, found and decided stays on record.
    """
    folder = Path(__file__).parents[1]
    written = (path.read_text() for suffix in ("sql", "py") for path in folder.rglob(f"*.{suffix}"))
    return frozenset(re.findall(r"DELETE FROM trueup\.(\w+)", "\n".join(written)))


# By the catalog, not by looking names up: that needs rights of its own.
_LACKING = text(
    """
    WITH found AS MATERIALIZED (
        SELECT w.*, n.oid AS schema_id, p.oid AS function_id, c.oid AS table_id
        FROM unnest(CAST(:kinds AS text[]), CAST(:names AS text[]), CAST(:columns AS text[]),
                    CAST(:privileges AS text[])) WITH ORDINALITY AS w (kind, name, "column", privilege, place)
        LEFT JOIN pg_namespace n ON w.kind = 'schema' AND n.nspname = w.name
        LEFT JOIN pg_proc p ON w.kind = 'function' AND p.pronamespace = to_regnamespace(:schema)
                           AND CAST(CAST(p.oid AS regprocedure) AS text) = w.name
        LEFT JOIN (SELECT t.oid, quote_ident(s.nspname) || '.' || quote_ident(t.relname) AS name
                   FROM pg_class t JOIN pg_namespace s ON s.oid = t.relnamespace) c
            ON w.kind IN ('table', 'sequence') AND c.name = w.name
    )
    SELECT place FROM found
    WHERE CASE WHEN kind = 'schema' THEN has_schema_privilege(schema_id, privilege)
               WHEN kind = 'function' THEN has_function_privilege(function_id, privilege)
               WHEN kind = 'sequence' THEN has_sequence_privilege(table_id, privilege)
               WHEN "column" = '' THEN has_table_privilege(table_id, privilege)
               ELSE has_column_privilege(table_id, "column", privilege) END IS NOT TRUE
    ORDER BY place
    """
)


def lacking_rights(connection: Connection, rights: Sequence[Right]) -> list[Right]:
    """Return those that the current role does not have, columns one by one."""
    single = []
    for right in rights:
        columns: list[tuple[str, ...]] = [(column,) for column in right.columns]
        single += [replace(right, columns=column) for column in columns or [()]]
    places = connection.execute(
        _LACKING,
        {
            "kinds": [right.kind for right in single],
            "names": [right.name for right in single],
            "columns": ["".join(right.columns) for right in single],
            "privileges": [right.privilege for right in single],
            "schema": SCHEMA,
        },
    )
    return [single[place - 1] for place in places.scalars()]


def refuse_without_rights(connection: Connection, mapping: HostMapping) -> None:
    """Raise `MissingRightError` unless this role may set trueup up: it names what to run."""
    lacking = find_lacking(connection, mapping)
    if lacking:
        raise MissingRightError(
            f"This role lacks {', '.join(right for right, _ in lacking)}. Nothing was changed. The owner of the tables "
            f"gives it: {' '.join(f'{statement};' for _, statement in lacking)}"
        )


def find_lacking(connection: Connection, mapping: HostMapping) -> list[tuple[str, str]]:
    """Return the rights that setting up takes and the current role has not, each with the statement that gives it."""
    role = quote_identifier(str(connection.scalar(text("SELECT current_user"))))
    database = quote_identifier(str(connection.scalar(text("SELECT current_database()"))))
    found = []
    owner = connection.execute(_OWNER).one_or_none()
    if owner is None and not connection.scalar(_MAY_CREATE):
        found.append((f"CREATE ON DATABASE {database}", f"GRANT CREATE ON DATABASE {database} TO {role}"))
    elif owner is not None and not owner.is_ours:
        found.append(("to own SCHEMA trueup", f"GRANT {quote_identifier(owner.name)} TO {role}"))
    rights = lacking_rights(connection, migrate_rights(connection, mapping))
    return found + [(str(right), f"GRANT {right} TO {role}") for right in rights]


def _host_rights(connection: Connection, mapping: HostMapping, *, read_users: bool, write: bool) -> list[Right]:
    """Return the rights on the mapped columns that there are, and on no others: hosts keep more than tokens."""
    rights = []
    for noun in NOUNS if read_users else [noun for noun in NOUNS if noun != "user"]:
        names = getattr(mapping, noun)
        if names.table is None:
            continue
        table = _qualified(connection, names.table)
        there = column_names(connection, names.table)
        mapped = dict.fromkeys(column for _, column in mapping.columns(noun))
        verbs = {"SELECT": tuple(column for column in mapped if column in there)}
        if write and noun == "subscription":
            verbs["UPDATE"] = (names.tokens_remaining,)
        if write and noun == "usage_log":
            verbs["INSERT"] = tuple(column for column in names.written if column in there)
            # What went wrong is written into a row of our own after its insert.
            told = names.error_message if names.error_message in there else names.metadata
            if isinstance(told, str):
                verbs["UPDATE"] = (told,)
        rights += [Right(kind="table", name=table, privilege=verb, columns=of) for verb, of in verbs.items()]
    return rights


def _own_rights(connection: Connection) -> list[Right]:
    """Return what it takes to look at schema `trueup` and to call its functions, but for the triggers'.

    Who may call a trigger's function may put it on a table of his own, and write deltas with its owner's rights.
    """
    functions = connection.scalars(
        text(
            "SELECT CAST(CAST(p.oid AS regprocedure) AS text) FROM pg_proc p "
            "WHERE p.pronamespace = to_regnamespace(:schema) AND p.prorettype <> CAST('trigger' AS regtype) ORDER BY 1"
        ),
        {"schema": SCHEMA},
    )
    return [
        Right(kind="schema", name=SCHEMA, privilege="USAGE"),
        *(_on_own(table, "SELECT") for table in _own_tables(connection)),
        *(Right(kind="function", name=function, privilege="EXECUTE") for function in functions),
    ]


def _on_own(table: str, privilege: str) -> Right:
    """Return a right on one of our tables, whose names need no quotes."""
    return Right(kind="table", name=f"{SCHEMA}.{table}", privilege=privilege)


def _own_tables(connection: Connection) -> list[str]:
    return list(
        connection.scalars(
            text("SELECT tablename FROM pg_tables WHERE schemaname = :schema ORDER BY 1"), {"schema": SCHEMA}
        )
    )


def _qualified(connection: Connection, table: str) -> str:
    """Return the table as it is found now, with its schema: the role's search path may be another."""
    found = connection.execute(
        text(
            "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(:quoted)"
        ),
        {"quoted": quote_table(table)},
    ).scalar()
    return str(found or quote_table(table))


_OWNER = text(
    "SELECT pg_get_userbyid(nspowner) AS name, pg_has_role(nspowner, 'USAGE') AS is_ours FROM pg_namespace "
    "WHERE nspname = 'trueup'"
)


_MAY_CREATE = text("SELECT has_database_privilege(current_database(), 'CREATE')")
