"""trueup's SQL functions as part of a statement, for a database in which they are not installed.

The look before an installation asks just what an installed trueup asks: each call of a function of ours is replaced by
the function's own body, out of the same files. PostgreSQL finds a name in such a body first among the body's columns,
then among the parameters. In a lateral subquery it does just the same, if the parameters are the columns of a row
beside it that is called like the function. Our own tables are not there either: none has a row.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from sqlalchemy.dialects import postgresql

from trueup.database.schema import SCHEMA, build_metadata
from trueup.host.mapping import HostMapping
from trueup.host.sql_templates import with_parts

# [^$]: a definition ends where its body begins, and does not go on into the next one's.
_DEFINITION = re.compile(
    r"FUNCTION\s+trueup\.(?P<name>\w+)\s*\((?P<parameters>[^$]*?)\)\s*RETURNS\s+(?P<returns>[^$]*?)\s+"
    r"LANGUAGE\s+(?P<language>\w+)\s[^$]*?AS\s+\$\$(?P<body>.*?)\$\$",
    re.DOTALL,
)
_CALL = re.compile(r"(?P<lateral>\bLATERAL\s+)?\btrueup\.(?P<name>\w+)\s*\(")
_TABLE = re.compile(r"\btrueup\.(\w+)\b")
_COMMENT = re.compile(r"--[^\n]*")
_COUNTS = ("bigint", "numeric", "integer")


@dataclass(frozen=True, kw_only=True)
class _Function:
    """A function of ours. `columns`: what its rows consist of, as (name, type); None: it returns one value."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    columns: tuple[tuple[str, str], ...] | None
    returns: str
    language: str
    body: str


def inline(statement: str, mapping: HostMapping) -> str:
    """Return the SQL template with our functions' bodies in place of their calls, and our tables empty.

    What is written in PL/pgSQL only tells of our own rows: it has none to tell of. Raises KeyError for a function that
    there is none of.
    """
    files = tuple(_files(mapping))
    expanded = _expand(_COMMENT.sub("", statement), _functions(files))
    names = sorted(set(_TABLE.findall(expanded)))
    tables = build_metadata(mapping.user_id_type).tables
    empty = []
    for name in names:
        columns = ", ".join(
            f"CAST(NULL AS {column.type.compile(dialect=postgresql.dialect())}) AS {column.name}"  # type: ignore[no-untyped-call]
            for column in tables[f"{SCHEMA}.{name}"].columns
        )
        empty.append(f"trueup_{name} AS NOT MATERIALIZED (SELECT {columns} WHERE false)")
    if not empty:
        return expanded
    body = _TABLE.sub(r"trueup_\1", expanded).strip()
    rest = f", {body[len('WITH') :]}" if body.upper().startswith("WITH") else f" {body}"
    return f"WITH {', '.join(empty)}{rest}"


def _files(mapping: HostMapping) -> list[str]:
    """Return the names of the files that hold for this mapping."""
    left_out = {
        "drift/no_decrements.sql" if mapping.token_usage.table else "drift/decrements.sql",
        "drift/no_purchases.sql" if mapping.payment.table else "drift/purchases.sql",
    }
    rooms = [room for room in resources.files("trueup").iterdir() if room.is_dir()]
    found = {f"{room.name}/{file.name}" for room in rooms for file in room.iterdir() if file.name.endswith(".sql")}
    return sorted(found - left_out)


@cache
def _functions(files: tuple[str, ...]) -> dict[str, _Function]:
    found = {}
    for name in files:
        template = resources.files("trueup").joinpath(name).read_text(encoding="utf-8")
        content = _COMMENT.sub("", with_parts(template))
        for match in _DEFINITION.finditer(content):
            returns = match["returns"]
            columns = None
            if returns.startswith("TABLE"):
                columns = _pairs(returns[returns.index("(") + 1 : returns.rindex(")")])
            elif returns.startswith("SETOF"):
                columns = (("value", returns.removeprefix("SETOF").strip()),)
            found[match["name"]] = _Function(
                name=match["name"],
                parameters=_pairs(match["parameters"]),
                columns=columns,
                returns=returns,
                language=match["language"],
                body=match["body"].strip().rstrip(";"),
            )
    return found


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Return "a integer, b text" as names and types."""
    return tuple((name, kind.strip()) for name, _, kind in (part.strip().partition(" ") for part in _split(text)))


def _expand(text: str, functions: dict[str, _Function]) -> str:
    parts = []
    position = 0
    while match := _CALL.search(text, position):
        end = _closing(text, match.end())
        arguments = [_expand(part, functions) for part in _split(text[match.end() : end])]
        parts.append(text[position : match.start()])
        parts.append(_call(functions[match["name"]], arguments, functions))
        position = end + 1
    return "".join([*parts, text[position:]])


def _call(function: _Function, arguments: list[str], functions: dict[str, _Function]) -> str:
    """Return what stands for a call."""
    if function.language != "sql":
        return _nothing(function)
    given = [
        f"CAST({argument} AS {kind}) AS {name}"
        for argument, (name, kind) in zip(arguments, function.parameters, strict=True)
    ]
    beside = f"(SELECT {', '.join(given)}) AS {function.name} CROSS JOIN LATERAL " if given else ""
    names = ", ".join(name for name, _ in function.columns) if function.columns else "value"
    rows = f"SELECT trueup_rows.* FROM {beside}({_expand(function.body, functions)}) AS trueup_rows ({names})"
    return f"LATERAL ({rows})" if function.columns else f"({rows})"


def _nothing(function: _Function) -> str:
    if function.columns is None:
        return f"CAST({0 if function.returns in _COUNTS else 'NULL'} AS {function.returns})"
    columns = ", ".join(f"CAST(NULL AS {kind}) AS {name}" for name, kind in function.columns)
    return f"LATERAL (SELECT {columns} WHERE false)"


def _closing(text: str, start: int) -> int:
    """Return where the parenthesis that is open at `start` closes. Strings have none in them."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError("a parenthesis is left open in SQL of trueup's")


def _split(text: str) -> list[str]:
    """Split a list at its own commas."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    last = text[start:]
    return [*parts, last] if parts or last.strip() else []
