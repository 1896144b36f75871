"""A role of the host that may create in `public` takes the place of PostgreSQL's own functions and operators."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, text

from tests.hosts.documents import ROOT

# What a call of one of them does: a caller may catch the error, but not undo the sequence.
_TRAP = "BEGIN PERFORM pg_catalog.nextval('public.trapped'); RAISE EXCEPTION 'hostile code ran: {name}'; END"

# The functions and aggregates of these names, with the very same parameters.
_SAME_FUNCTIONS = text(
    """
    SELECT DISTINCT p.proname AS name,
           array_to_string(ARRAY(SELECT format_type(t.id, NULL) FROM unnest(CAST(p.proargtypes AS oid[]))
                                 WITH ORDINALITY AS t (id, place) ORDER BY t.place), ', ') AS parameters,
           CASE WHEN p.proretset THEN 'SETOF ' ELSE '' END || format_type(p.prorettype, NULL) AS result
    FROM pg_proc p
    WHERE p.pronamespace = CAST('pg_catalog' AS regnamespace) AND p.proname = ANY (CAST(:names AS text[]))
      AND p.prokind IN ('f', 'a', 'w')
      AND NOT EXISTS (SELECT FROM unnest(CAST(p.proargtypes AS oid[]) || p.prorettype) t (id)
                      JOIN pg_type y ON y.oid = t.id WHERE y.typtype = 'p')
      AND p.proallargtypes IS NULL AND p.provariadic = 0
    """
)
# Types that SQL converts silently: an operator of exactly these is preferred to one of pg_catalog's after a conversion.
_TYPES = ("text", "varchar", "name", "oid", "regclass", "regprocedure", "integer", "bigint", "numeric", "uuid", "jsonb")
_OPERATORS = ("||", "=", "<>", "<", ">", "<=", ">=", "+", "-", "*")
_OWN_OPERATORS = text(
    """
    SELECT o.oprname AS name, format_type(o.oprleft, NULL) AS a, format_type(o.oprright, NULL) AS b FROM pg_operator o
    JOIN pg_type l ON l.oid = o.oprleft JOIN pg_type r ON r.oid = o.oprright
    WHERE o.oprnamespace = CAST('pg_catalog' AS regnamespace) AND o.oprkind = 'b' AND o.oprname <> '=>'
      AND l.typtype = 'b' AND r.typtype = 'b'
    """
)


def called_names() -> list[str]:
    """Return every name that trueup's SQL and Python call with parentheses."""
    packages = (ROOT / package for package in ("trueup", "cli", "tasks", "worker"))
    sources = (path for package in packages for path in package.rglob("*") if path.suffix in (".py", ".sql"))
    return sorted({name for path in sources for name in re.findall(r"\b([a-z_][a-z_0-9]*)\(", path.read_text())})


def set_traps(connection: Connection, role: str) -> int:
    """Let the role make in `public` what may be called in place of PostgreSQL's own. Returns the number of traps."""
    connection.execute(text("CREATE SEQUENCE public.trapped"))
    connection.execute(text("GRANT ALL ON SEQUENCE public.trapped TO PUBLIC"))
    connection.execute(text(f"GRANT CREATE ON SCHEMA public TO {role}"))
    functions = connection.execute(_SAME_FUNCTIONS, {"names": called_names()}).all()
    pairs = {(row.name, row.a, row.b) for row in connection.execute(_OWN_OPERATORS)}
    pairs |= {(name, a, b) for name in _OPERATORS for a in _TYPES for b in _TYPES}
    connection.execute(text(f"SET LOCAL ROLE {role}"))
    connection.execute(text("SET LOCAL search_path = pg_catalog"))
    statements = [
        f'CREATE FUNCTION public."{row.name}"({row.parameters}) RETURNS {row.result} LANGUAGE plpgsql AS '
        f"$trap$ {_TRAP.format(name=row.name)} $trap$"
        for row in functions
    ]
    for number, (a, b) in enumerate(sorted({(a, b) for _, a, b in pairs})):
        body = _TRAP.format(name=f"an operator of {a} and {b}")
        for kind in ("boolean", "text"):
            function = f"CREATE FUNCTION public.trap_{number}_{kind}({a}, {b}) RETURNS {kind}"
            statements.append(f"{function} LANGUAGE plpgsql AS $trap$ {body} $trap$")
        for name in sorted({one for one, left, right in pairs if (left, right) == (a, b)}):
            kind = "text" if name in ("||", "+", "-", "*") else "boolean"
            statements.append(
                f"CREATE OPERATOR public.{name} (LEFTARG = {a}, RIGHTARG = {b}, FUNCTION = public.trap_{number}_{kind})"
            )
    connection.exec_driver_sql(";\n".join(statements).replace("%", "%%"))
    connection.execute(text("RESET ROLE"))
    return len(statements)


def trapped(engine: Engine) -> bool:
    """Return whether any of the traps was called since they were set, in any session."""
    with engine.connect() as connection:
        return bool(connection.execute(text("SELECT is_called FROM public.trapped")).scalar_one())


@contextmanager
def role_that_may_create(engine: Engine, name: str) -> Iterator[str]:
    """Give a role without any right, dropped with all that it owns at the end."""
    with engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {name}"))
    try:
        yield name
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"DROP OWNED BY {name} CASCADE"))
            connection.execute(text(f"DROP ROLE {name}"))
