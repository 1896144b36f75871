"""The rights of the least-privilege roles: what each role needs, the GRANT statements, and what a role lacks.

`migrate` owns schema `trueup` and may create triggers on the host's log and subscriptions. `worker` runs the gate,
charges and reconciliation, and can't change any table's structure. `readonly` reads.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection, text

from trueup.database.schema import SCHEMA, own_table
from trueup.errors import InvalidInputError, MissingRightError, NotInstalledError
from trueup.host.catalog import column_names, missing_host_tables
from trueup.host.fields import NOUNS
from trueup.host.log_ids import log_id_sequence
from trueup.host.mapping import HostMapping, quote_identifier, quote_table
from trueup.host.partitions import log_tables
from trueup.host.setting_values import quote_literal

# Only migrations write these tables; the log's triggers write them with their owner's rights.
MIGRATED = frozenset({"alembic_version", "installation", "log_truncation"})
# Except for the log's state in the baseline: see trueup.record_log_state().
_LOG_STATE = ("column_versions", "log_files", "log_parents", "partitions")
# PostgreSQL cuts a longer name, and two names could become one.
_MAX_NAME_BYTES = 63


@dataclass(frozen=True, kw_only=True)
class RoleNames:
    """The names of the three roles."""

    migrate: str = "trueup_migrate"
    worker: str = "trueup_worker"
    readonly: str = "trueup_readonly"


@dataclass(frozen=True, kw_only=True)
class Right:
    """A privilege on an object, whose name is quoted as in SQL. `columns` empty: on the whole object."""

    kind: Literal["schema", "table", "sequence", "function"]
    name: str
    privilege: str
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        columns = f" ({', '.join(map(quote_identifier, self.columns))})" if self.columns else ""
        return f"{self.privilege}{columns} ON {self.kind.upper()} {self.name}"


def grants_sql(connection: Connection, mapping: HostMapping, roles: RoleNames) -> list[str]:
    """Return the statements that create the roles and grant their rights: for one transaction, safe to repeat.

    Raises `InvalidInputError` for an invalid or repeated role name, and `NotInstalledError` if a host table is missing.
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
    return [
        *(_create(role) for role in (roles.migrate, roles.worker, roles.readonly)),
        f"GRANT CONNECT ON DATABASE {database} TO {everyone}",
        # Both roles try rows, conditions and expressions on a temporary table.
        f"GRANT TEMPORARY ON DATABASE {database} TO {migrate}, {worker}",
        *(f"GRANT USAGE ON SCHEMA {schema} TO {everyone}" for schema in _schemas(connection, mapping)),
        f"CREATE SCHEMA IF NOT EXISTS {SCHEMA} AUTHORIZATION {migrate}",
        f"ALTER SCHEMA {SCHEMA} OWNER TO {migrate}",
        *_ownership_sql(connection, roles.migrate),
        *_grants(migrate_rights(connection, mapping), migrate),
        # For what a later `trueup db init` creates. Run this again after it: the lines below grant the exact rights.
        f"{by_default} GRANT SELECT, INSERT, UPDATE ON TABLES TO {worker}",
        f"{by_default} GRANT SELECT ON TABLES TO {readonly}",
        f"{by_default} GRANT EXECUTE ON FUNCTIONS TO {worker}, {readonly}",
        f"REVOKE ALL ON ALL TABLES IN SCHEMA {SCHEMA} FROM {worker}, {readonly}",
        *_grants(worker_rights(connection, mapping), worker),
        *_grants(readonly_rights(connection, mapping), readonly),
    ]


def migrate_rights(connection: Connection, mapping: HostMapping) -> list[Right]:
    """Return the rights on the host's tables that the `migrate` role needs, besides owning schema `trueup`."""
    tables = [*log_tables(connection, mapping), _qualified(connection, mapping.subscription.table)]
    return [
        *(Right(kind="table", name=table, privilege="TRIGGER") for table in tables),
        *_host_rights(connection, mapping, as_worker=False),
    ]


def worker_rights(connection: Connection, mapping: HostMapping) -> list[Right]:
    """Return the rights that the role of the workers, the API and the commands needs."""
    rights = [*_host_rights(connection, mapping, as_worker=True), *_own_rights(connection)]
    sequence = log_id_sequence(connection, mapping)
    if sequence is not None:
        rights.append(Right(kind="sequence", name=sequence, privilege="USAGE"))
    deletable = deletable_tables()
    for table in _own_tables(connection):
        verbs = ["INSERT", "UPDATE", "DELETE"] if table in deletable else ["INSERT", "UPDATE"]
        rights += [_on_own(table, verb) for verb in ([] if table in MIGRATED else verbs)]
        if table == "installation":
            rights.append(replace(_on_own(table, "UPDATE"), columns=_LOG_STATE))
        if table == "log_truncation":
            rights.append(_on_own(table, "INSERT"))
    return rights


def readonly_rights(connection: Connection, mapping: HostMapping) -> list[Right]:
    """Return the rights that the role of reports needs."""
    return [
        *_host_rights(connection, mapping, as_worker=False),
        *(_without_secret(right, mapping) for right in _own_rights(connection)),
    ]


def _without_secret(right: Right, mapping: HostMapping) -> Right:
    """Return the right without the secret of trueup's marks: a role that reads it can hide log rows from balances."""
    if right != _on_own("installation", "SELECT"):
        return right
    columns = own_table("installation", mapping.user_id_type).columns.keys()
    return replace(right, columns=tuple(name for name in columns if name != "mark_secret"))


@cache
def deletable_tables() -> frozenset[str]:
    """Return the tables from which trueup deletes rows: those in the DELETE statements of its code.

    It never deletes from the others: holds, charges, drifts and decisions stay on record.
    """
    folder = Path(__file__).parents[1]
    written = (path.read_text() for suffix in ("sql", "py") for path in folder.rglob(f"*.{suffix}"))
    return frozenset(re.findall(r"DELETE FROM trueup\.(\w+)", "\n".join(written)))


def lacking_rights(connection: Connection, rights: Sequence[Right]) -> list[Right]:
    """Return the rights that the current role does not have, each column by itself."""
    single = []
    for right in rights:
        columns: list[tuple[str, ...]] = [(column,) for column in right.columns]
        single += [replace(right, columns=column) for column in columns or [()]]
    values = {
        "kinds": [right.kind for right in single],
        "names": [right.name for right in single],
        "columns": ["".join(right.columns) for right in single],
        "privileges": [right.privilege for right in single],
        "schema": SCHEMA,
    }
    return [single[place - 1] for place in connection.scalars(_LACKING, values)]


def refuse_without_rights(connection: Connection, mapping: HostMapping) -> None:
    """Raise `MissingRightError` with the GRANT statements unless the current role may set trueup up."""
    lacking = find_lacking(connection, mapping)
    if lacking:
        raise MissingRightError(
            f"This role lacks {', '.join(right for right, _ in lacking)}. Nothing was changed. Let the owner of the "
            f"tables run: {' '.join(f'{statement};' for _, statement in lacking)}"
        )


def find_lacking(connection: Connection, mapping: HostMapping) -> list[tuple[str, str]]:
    """Return the rights for setting trueup up that the current role lacks, each with the statement that grants it."""
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


def _check_names(roles: RoleNames) -> None:
    names = {"migrate role": roles.migrate, "worker role": roles.worker, "readonly role": roles.readonly}
    for field, name in names.items():
        if not name or "\x00" in name or "$$" in name or len(name.encode()) > _MAX_NAME_BYTES:
            raise InvalidInputError(f"{field}: {name!r} is no role: give 1 to {_MAX_NAME_BYTES} bytes, without $$")
    if len(set(names.values())) < len(names):
        raise InvalidInputError("migrate, worker and readonly role: two have the same name. Give three different names")


def _create(role: str) -> str:
    return (
        f"DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {quote_literal(role)}) THEN "
        f"CREATE ROLE {quote_identifier(role)} LOGIN; END IF; END $$"
    )


def _grants(rights: Iterable[Right], role: str) -> Iterator[str]:
    """Yield a GRANT for each object and privilege, and one for all functions together."""
    functions = []
    for right in rights:
        if right.kind == "function":
            functions.append(right.name)
        else:
            yield f"GRANT {right} TO {role}"
    if functions:
        yield f"GRANT EXECUTE ON FUNCTION {', '.join(functions)} TO {role}"


def _ownership_sql(connection: Connection, owner: str) -> list[str]:
    """Return the statements that hand over another role's objects, such as those of a first setup by a superuser."""
    found = connection.scalars(_OWNED_BY_OTHERS, {"schema": SCHEMA, "owner": owner})
    return [f"ALTER {named} OWNER TO {quote_identifier(owner)}" for named in found]


def _schemas(connection: Connection, mapping: HostMapping) -> list[str]:
    return list(connection.scalars(_SCHEMAS, {"tables": [quote_table(table) for table in mapping.tables()]}))


def _host_rights(connection: Connection, mapping: HostMapping, *, as_worker: bool) -> list[Right]:
    """Return the rights on the mapped columns that exist, and on no others: hosts keep more than tokens.

    `as_worker`: also read users, correct counters and insert log rows.
    """
    rights = []
    for noun in NOUNS if as_worker else [noun for noun in NOUNS if noun != "user"]:
        names = getattr(mapping, noun)
        if names.table is None:
            continue
        table = _qualified(connection, names.table)
        there = column_names(connection, names.table)
        mapped = dict.fromkeys(column for _, column in mapping.columns(noun))
        verbs = {"SELECT": tuple(column for column in mapped if column in there)}
        if as_worker and noun == "subscription":
            verbs["UPDATE"] = (names.tokens_remaining,)
        if as_worker and noun == "usage_log" and names.record != "host":
            verbs["INSERT"] = tuple(column for column in names.written if column in there)
            # trueup writes the error into its own row after the insert.
            error = names.error_message if names.error_message in there else names.metadata
            if isinstance(error, str):
                verbs["UPDATE"] = (error,)
        rights += [Right(kind="table", name=table, privilege=verb, columns=of) for verb, of in verbs.items()]
    return rights


def _own_rights(connection: Connection) -> list[Right]:
    """Return the rights to read schema `trueup` and to call its functions, except the triggers'.

    A role that may call a trigger function may put it on a table of its own, and write deltas with the owner's rights.
    """
    return [
        Right(kind="schema", name=SCHEMA, privilege="USAGE"),
        *(_on_own(table, "SELECT") for table in _own_tables(connection)),
        *(
            Right(kind="function", name=function, privilege="EXECUTE")
            for function in connection.scalars(_FUNCTIONS, {"schema": SCHEMA})
        ),
    ]


def _on_own(table: str, privilege: str) -> Right:
    """Return a right on one of trueup's tables, whose names need no quotes."""
    return Right(kind="table", name=f"{SCHEMA}.{table}", privilege=privilege)


def _own_tables(connection: Connection) -> list[str]:
    return list(connection.scalars(_OWN_TABLES, {"schema": SCHEMA}))


def _qualified(connection: Connection, table: str) -> str:
    """Return the table with the schema where it is found now: another role may have another search path."""
    return str(connection.scalar(_QUALIFIED, {"quoted": quote_table(table)}) or quote_table(table))


# By the catalog: looking a name up needs rights of its own.
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
# The sequence of an identity column changes its owner with the table.
_OWNED_BY_OTHERS = text(
    """
    SELECT 'TABLE ' || CAST(CAST(c.oid AS regclass) AS text)
    FROM pg_class c
    WHERE c.relnamespace = to_regnamespace(:schema) AND c.relkind IN ('r', 'p')
      AND pg_get_userbyid(c.relowner) <> :owner
    UNION ALL
    SELECT 'FUNCTION ' || CAST(CAST(p.oid AS regprocedure) AS text)
    FROM pg_proc p
    WHERE p.pronamespace = to_regnamespace(:schema) AND pg_get_userbyid(p.proowner) <> :owner
    ORDER BY 1
    """
)
_SCHEMAS = text(
    "SELECT DISTINCT quote_ident(n.nspname) FROM unnest(CAST(:tables AS text[])) AS t (name) "
    "JOIN pg_class c ON c.oid = to_regclass(t.name) JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY 1"
)
_FUNCTIONS = text(
    "SELECT CAST(CAST(p.oid AS regprocedure) AS text) FROM pg_proc p "
    "WHERE p.pronamespace = to_regnamespace(:schema) AND p.prorettype <> CAST('trigger' AS regtype) ORDER BY 1"
)
_OWN_TABLES = text("SELECT tablename FROM pg_tables WHERE schemaname = :schema ORDER BY 1")
_QUALIFIED = text(
    "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c "
    "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(:quoted)"
)
_OWNER = text(
    "SELECT pg_get_userbyid(nspowner) AS name, pg_has_role(nspowner, 'USAGE') AS is_ours FROM pg_namespace "
    "WHERE nspname = 'trueup'"
)
_MAY_CREATE = text("SELECT has_database_privilege(current_database(), 'CREATE')")
