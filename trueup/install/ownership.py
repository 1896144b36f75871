"""Whose trueup's own objects are."""

from sqlalchemy import Connection, text

from trueup.database.schema import SCHEMA
from trueup.host.mapping import quote_identifier

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


def ownership_sql(connection: Connection, owner: str) -> list[str]:
    """Return what hands over objects that another role made, as when the first setup was a superuser's."""
    found = connection.scalars(_OWNED_BY_OTHERS, {"schema": SCHEMA, "owner": owner})
    return [f"ALTER {what} OWNER TO {quote_identifier(owner)}" for what in found]
