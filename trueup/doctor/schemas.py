"""Schemas in which other roles may create objects: what they create there may be called in place of something else."""

from collections.abc import Iterator

from sqlalchemy import Connection, text

from trueup.database.schema import SCHEMA
from trueup.doctor.findings import Finding, error, ok, warning
from trueup.host.mapping import quote_identifier, quote_table
from trueup.settings.settings import Settings

# A superuser may do it anyway, and so may the owner of a schema. The owner of a mapped table decides about it anyway.
_CREATORS = text(
    """
    WITH mapped AS (
        SELECT c.relnamespace AS schema, c.relowner AS owner
        FROM unnest(CAST(:tables AS text[])) AS t (name) JOIN pg_class c ON c.oid = to_regclass(t.name)
    )
    SELECT n.nspname AS schema, CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE CAST(r.rolname AS text) END AS role
    FROM pg_namespace n
    CROSS JOIN LATERAL aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
    LEFT JOIN pg_roles r ON r.oid = a.grantee
    WHERE (n.nspname = :own OR n.oid IN (SELECT m.schema FROM mapped m))
      AND a.privilege_type = 'CREATE' AND a.grantee <> n.nspowner AND r.rolsuper IS NOT TRUE
      AND NOT EXISTS (SELECT FROM mapped m WHERE m.schema = n.oid AND m.owner = a.grantee)
    GROUP BY 1, 2 ORDER BY 1, 2
    """
)


def check_schemas(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield the schemas of mapped tables, and trueup's own, in which roles other than the owner may create objects."""
    values = {"own": SCHEMA, "tables": [quote_table(table) for table in settings.host.tables()]}
    creators: dict[str, list[str]] = {}
    for row in connection.execute(_CREATORS, values):
        creators.setdefault(row.schema, []).append(row.role)
    for schema, roles in creators.items():
        named = ", ".join(role if role == "PUBLIC" else quote_identifier(role) for role in roles)
        remedy = f"REVOKE CREATE ON SCHEMA {quote_identifier(schema)} FROM {named};"
        detail = {"schema": schema, "roles": roles}
        if schema == SCHEMA:
            what = f"Roles other than its owner may create objects in schema {schema}: {named}."
            yield error("schemas", what, remedy, **detail)
        else:
            yield warning(
                "schemas",
                f"Roles may create objects in schema {schema} of the host: {named}. trueup calls none of them, but a "
                "trigger of the host that names objects without a schema may, with the rights of trueup's role.",
                f"{remedy} Or give the host's trigger functions a SET search_path.",
                **detail,
            )
    if not creators:
        yield ok("schemas", "Only owners may create objects in the schemas of the host's tables and of trueup.")
