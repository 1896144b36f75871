"""Least-privilege roles, and the statements that make them and give them their rights.

migrate owns schema `trueup` and may put triggers on the host's log and subscriptions; worker runs the gate, charges and
reconciling, and can change no structure; readonly looks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, text

from trueup.database.schema import SCHEMA
from trueup.errors import InvalidInputError, NotInstalledError
from trueup.host.catalog import missing_host_tables
from trueup.host.mapping import HostMapping, quote_identifier, quote_table
from trueup.host.setting_values import quote_literal
from trueup.install.rights import Right, migrate_rights, readonly_rights, worker_rights

# PostgreSQL cuts a longer name, and two could become one.
_MAX_NAME_BYTES = 63


@dataclass(frozen=True, kw_only=True)
class RoleNames:
    """What the three roles are called."""

    migrate: str = "trueup_migrate"
    worker: str = "trueup_worker"
    readonly: str = "trueup_readonly"


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
        *_ownership_sql(connection, roles.migrate),
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
        if not name or "\x00" in name or "$$" in name or len(name.encode()) > _MAX_NAME_BYTES:
            raise InvalidInputError(f"{field}: {name!r} is no role: give 1 to {_MAX_NAME_BYTES} bytes, without $$")
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


# A sequence of an identity column goes with its table.
_OWNED_BY_OTHERS = text(
    """
    SELECT 'TABLE ' || CAST(c.oid::regclass AS text)
    FROM pg_class c
    WHERE c.relnamespace = to_regnamespace(:schema) AND c.relkind IN ('r', 'p')
      AND pg_get_userbyid(c.relowner) <> :owner
    UNION ALL
    SELECT 'FUNCTION ' || CAST(p.oid::regprocedure AS text)
    FROM pg_proc p
    WHERE p.pronamespace = to_regnamespace(:schema) AND pg_get_userbyid(p.proowner) <> :owner
    ORDER BY 1
    """.replace("::", r"\:\:")
)


def _ownership_sql(connection: Connection, owner: str) -> list[str]:
    """Return what hands over objects that another role made, as when the first setup was a superuser's."""
    found = connection.scalars(_OWNED_BY_OTHERS, {"schema": SCHEMA, "owner": owner})
    return [f"ALTER {what} OWNER TO {quote_identifier(owner)}" for what in found]


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
