"""Least-privilege roles: what trueup's parts need in a database, read from its catalog and the mapping.

migrate owns schema `trueup` and may put triggers on the host's log and subscriptions; worker runs the gate, charges and
reconciling, and can change no structure; readonly looks.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection, text

from trueup.database.schema import SCHEMA
from trueup.errors import InvalidInputError, NotInstalledError
from trueup.host.catalog import column_names, missing_host_tables
from trueup.host.columns import quote_literal
from trueup.host.log_ids import log_id_sequence
from trueup.host.mapping import NOUNS, HostMapping, quote_identifier, quote_table
from trueup.host.partitions import log_tables
from trueup.install.ownership import ownership_sql

# What only migrating writes; the log's triggers do so with its owner's rights.
MIGRATED = frozenset({"alembic_version", "installation", "log_truncation"})
# But for what has become of the log: trueup.note_log().
_NOTED = ("column_versions", "log_files", "log_parents", "partitions")
# PostgreSQL cuts a longer name, and two could become one.
_LONGEST_NAME_BYTES = 63

Kind = Literal["schema", "table", "sequence", "function"]


@dataclass(frozen=True, kw_only=True)
class RoleNames:
    """What the three roles are called."""

    migrate: str = "trueup_migrate"
    worker: str = "trueup_worker"
    readonly: str = "trueup_readonly"


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
    return [*_host_rights(connection, mapping, read_users=False, write=False), *_own_rights(connection)]


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


def grants_sql(connection: Connection, mapping: HostMapping, roles: RoleNames) -> list[str]:
    """Return the statements that make the roles and give them their rights: safe to repeat, in one transaction.

    Raises `InvalidInputError` for a role's name that can't be one or is given twice, and `NotInstalledError` when a
    host table is not there.
    """
    _check_names(roles)
    missing = missing_host_tables(connection, mapping)
    if missing:
        raise NotInstalledError(
            f"The database has no table {', '.join(missing)}. Nothing was printed. Map the host's names under [host] "
            "in trueup.toml."
        )
    migrate, worker, readonly = map(quote_identifier, (roles.migrate, roles.worker, roles.readonly))
    database = quote_identifier(str(connection.scalar(text("SELECT current_database()"))))
    everyone = f"{migrate}, {worker}, {readonly}"
    by_default = f"ALTER DEFAULT PRIVILEGES FOR ROLE {migrate} IN SCHEMA {SCHEMA}"
    statements = [_create(role) for role in (roles.migrate, roles.worker, roles.readonly)]
    statements += [
        f"GRANT CONNECT ON DATABASE {database} TO {everyone}",
        # Rows, conditions and expressions are tried out on a table that goes with the session.
        f"GRANT TEMPORARY ON DATABASE {database} TO {migrate}, {worker}",
        *(f"GRANT USAGE ON SCHEMA {schema} TO {everyone}" for schema in _schemas(connection, mapping)),
        f"CREATE SCHEMA IF NOT EXISTS {SCHEMA} AUTHORIZATION {migrate}",
        f"ALTER SCHEMA {SCHEMA} OWNER TO {migrate}",
        *ownership_sql(connection, roles.migrate),
        *_grants(migrate_rights(connection, mapping), migrate),
        # What a later `trueup db init` makes; run again after it, the lines below say it exactly.
        f"{by_default} GRANT SELECT, INSERT, UPDATE ON TABLES TO {worker}",
        f"{by_default} GRANT SELECT ON TABLES TO {readonly}",
        f"{by_default} GRANT EXECUTE ON FUNCTIONS TO {worker}, {readonly}",
        f"REVOKE ALL ON ALL TABLES IN SCHEMA {SCHEMA} FROM {worker}, {readonly}",
        *_grants(worker_rights(connection, mapping), worker),
        *_grants(readonly_rights(connection, mapping), readonly),
    ]
    return statements


def _check_names(roles: RoleNames) -> None:
    names = {"migrate role": roles.migrate, "worker role": roles.worker, "readonly role": roles.readonly}
    for field, name in names.items():
        if not name or "\x00" in name or "$$" in name or len(name.encode()) > _LONGEST_NAME_BYTES:
            raise InvalidInputError(f"{field}: {name!r} is no role: give 1 to {_LONGEST_NAME_BYTES} bytes, without $$")
    if len(set(names.values())) < len(names):
        raise InvalidInputError("migrate, worker and readonly role: give three different names, or they are one role")


def _create(role: str) -> str:
    return (
        f"DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {quote_literal(role)}) THEN "
        f"CREATE ROLE {quote_identifier(role)} LOGIN; END IF; END $$"
    )


def _grants(rights: Iterable[Right], role: str) -> Iterator[str]:
    """Yield a GRANT for each object and privilege; functions all at once, but for the triggers'."""
    functions = []
    for right in rights:
        if right.kind == "function":
            functions.append(right.name)
        else:
            yield f"GRANT {right} TO {role}"
    if functions:
        yield f"GRANT EXECUTE ON FUNCTION {', '.join(functions)} TO {role}"


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


def _schemas(connection: Connection, mapping: HostMapping) -> list[str]:
    return list(
        connection.scalars(
            text(
                "SELECT DISTINCT quote_ident(n.nspname) FROM unnest(CAST(:tables AS text[])) AS t (name) "
                "JOIN pg_class c ON c.oid = to_regclass(t.name) JOIN pg_namespace n ON n.oid = c.relnamespace "
                "ORDER BY 1"
            ),
            {"tables": [quote_table(table) for table in mapping.tables()]},
        )
    )
