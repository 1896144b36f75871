"""The rights that setting trueup up takes, and the statements that give them."""

from sqlalchemy import Connection, text

from trueup.errors import MissingRightError
from trueup.host.mapping import HostMapping, quote_identifier
from trueup.install.roles import lacking_rights, migrate_rights


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


_OWNER = text(
    "SELECT pg_get_userbyid(nspowner) AS name, pg_has_role(nspowner, 'USAGE') AS is_ours FROM pg_namespace "
    "WHERE nspname = 'trueup'"
)

_MAY_CREATE = text("SELECT has_database_privilege(current_database(), 'CREATE')")
