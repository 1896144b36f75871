"""Mutants of SQL functions: a change of a word, of a condition, of an assigned value or of a statement."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from tests.mutations.mutant import ROOT, InvalidMutantError, Mutant, changed, unique

FILES = ("trueup/gate", "trueup/usage/charges.sql", "trueup/usage/log_row.sql", "trueup/accounts/entitlements.sql")

_TOKEN = re.compile(
    r"(?P<skip>\s+|--[^\n]*|/\*.*?\*/)|(?P<string>'(?:[^']|'')*'|\"[^\"]*\")|(?P<word>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)"
    r"|(?P<number>\d+(?:\.\d+)?)|(?P<sign>:=|::|<=|>=|<>|->>|\|\||.)",
    re.DOTALL,
)

# What a word or a sign becomes.
_SWAPS: dict[str, dict[str, tuple[str, ...]]] = {
    "comparison": {
        "<": ("<=", ">="),
        "<=": ("<", ">"),
        ">": (">=", "<="),
        ">=": (">", "<"),
        "=": ("<>",),
        "<>": ("=",),
    },
    "and-or": {"AND": ("OR",), "OR": ("AND",)},
    "sum": {"+": ("-",), "-": ("+",)},
    "extreme": {"greatest": ("least",), "least": ("greatest",), "max": ("min",), "min": ("max",)},
    "constant": {"0": ("1",), "1": ("0",), "true": ("false",), "false": ("true",), "'infinity'": ("'-infinity'",)},
}

# Text that is left out or becomes other text.
_PATTERNS: tuple[tuple[str, str, str], ...] = (
    ("lock", r"FOR (NO KEY )?UPDATE( OF \w+)?( SKIP LOCKED)?", ""),
    ("lock", r" SKIP LOCKED", ""),
    ("not", r"\bNOT (?=\w)(?!DISTINCT|NULL|TRUE|EXISTS)", ""),
    ("not", r"\bNOT EXISTS", "EXISTS"),
    ("null", r"IS NOT (NULL|TRUE|DISTINCT FROM)", r"IS \1"),
    ("null", r"IS (NULL|TRUE|DISTINCT FROM)", r"IS NOT \1"),
    ("conflict", r"ON CONFLICT[^;]*(?=;)", ""),
    ("filter", r"FILTER \(WHERE [^()]*\)", ""),
)
_ENDS_OF_VALUE = frozenset(("FROM", "WHERE", "RETURNING", ";", ","))
_ENDS_OF_CONDITION = _ENDS_OF_VALUE | frozenset(
    "AND OR THEN ORDER GROUP LIMIT FOR INTO LOOP ON UNION HAVING ELSE WHEN END AS JOIN CROSS LEFT SET".split()  # noqa: SIM905
)
_CONDITION_STARTS = ("WHERE", "AND", "OR", "ON", "HAVING")
_DROPPED = ("PERFORM", "UPDATE", "INSERT", "DELETE", "RAISE", "RETURN", "SET", "LOCK")


@dataclass(frozen=True)
class _Token:
    text: str
    start: int
    end: int
    depth: int


class SqlFunction:
    """A function of a database. `engine`: connects to the database, from which the tests' databases are cloned."""

    def __init__(self, name: str, definition: str, engine: Engine) -> None:
        self.name = name
        self._engine = engine
        self._definition = definition
        self._body = definition.index("$function$") + len("$function$")

    def install(self, mutant: Mutant) -> None:
        try:
            with self._engine.begin() as connection:
                _run(connection, mutant.code)
        except DBAPIError as error:
            raise InvalidMutantError(str(error.orig)) from error

    def install_again(self, mutant: Mutant, engine: Engine) -> None:
        same = text(
            "SELECT count(*) FROM pg_proc p WHERE p.pronamespace = 'trueup'::regnamespace "
            "AND p.prokind = 'f' AND pg_get_functiondef(p.oid) = :definition"
        )
        with engine.begin() as connection:
            if connection.scalar(same, {"definition": self._definition}):
                _run(connection, mutant.code)

    def restore(self) -> None:
        with self._engine.begin() as connection:
            _run(connection, self._definition)

    def mutants(self) -> Iterator[Mutant]:
        """Make the mutants of the function's body; its comments and strings stay."""
        body = self._definition[self._body : self._definition.rindex("$function$")]
        tokens = _tokens(body)

        def mutant(kind: str, start: int, end: int, new: str) -> Mutant:
            code, was, now = changed(self._definition, self._body + start, self._body + end, new)
            return Mutant(function=self, kind=kind, was=was, now=now, code=code)

        found = (
            maker(body, tokens, mutant) for maker in (_swaps, _patterns, _coalesce, _conditions, _statements, _values)
        )
        yield from unique(self._definition, (each for mutants in found for each in mutants))


_Make = Callable[[str, int, int, str], Mutant]


def sql_functions(engine: Engine) -> list[SqlFunction]:
    """Read the functions of `FILES` from a database, with all that the installation has set for them."""
    paths = sorted(
        path for file in FILES for path in ([ROOT / file] if file.endswith(".sql") else (ROOT / file).glob("*.sql"))
    )
    names = [name for path in paths for name in re.findall(r"FUNCTION trueup\.(\w+)\(", path.read_text())]
    query = text(
        "SELECT p.proname, pg_get_functiondef(p.oid) FROM pg_proc p "
        "WHERE p.pronamespace = 'trueup'::regnamespace AND p.proname = ANY (:names) ORDER BY p.oid"
    )
    with engine.connect() as connection:
        return [
            SqlFunction(name, definition, engine) for name, definition in connection.execute(query, {"names": names})
        ]


def _run(connection: Connection, definition: str) -> None:
    connection.exec_driver_sql(definition.replace("%", "%%"))


def _tokens(body: str) -> list[_Token]:
    found, depth = [], 0
    for match in _TOKEN.finditer(body):
        if match.lastgroup == "skip":
            continue
        depth -= match[0] in (")", "]")
        found.append(_Token(match[0], match.start(), match.end(), depth))
        depth += match[0] in ("(", "[")
    return found


def _swaps(body: str, tokens: list[_Token], make: _Make) -> Iterator[Mutant]:
    assigning = {tokens[at + 1].start for _, at, _ in _assignments(tokens)}  # these signs compare nothing
    for kind, table in _SWAPS.items():
        for token in tokens:
            for new in table.get(token.text, ()) if token.start not in assigning else ():
                yield make(kind, token.start, token.end, new)


def _patterns(body: str, tokens: list[_Token], make: _Make) -> Iterator[Mutant]:
    starts = {token.start for token in tokens}
    for kind, pattern, new in _PATTERNS:
        for match in re.finditer(pattern, body):
            if match.start() + (match[0][0] == " ") in starts:
                yield make(kind, match.start(), match.end(), match.expand(new))


def _coalesce(body: str, tokens: list[_Token], make: _Make) -> Iterator[Mutant]:
    """coalesce(x, y) becomes x."""
    for number, token in enumerate(tokens):
        if token.text.lower() == "coalesce":
            inside = tokens[number + 1].depth + 1
            comma = next(t for t in tokens[number + 2 :] if t.text == "," and t.depth == inside)
            close = next(t for t in tokens[number + 2 :] if t.text == ")" and t.depth == inside - 1)
            yield make("coalesce", token.start, close.end, body[tokens[number + 1].end : comma.start])


def _last(tokens: list[_Token], number: int, ends: frozenset[str]) -> int:
    """Return the number of the last token of the expression that begins at this one."""
    depth, cases = tokens[number].depth, 0
    for at in range(number, len(tokens)):
        token = tokens[at]
        cases += token.text == "CASE"
        is_end = token.depth < depth or (token.depth == depth and token.text in ends)
        if is_end and not cases and at > number and tokens[at - 1].text not in ("DISTINCT", "BETWEEN"):
            return at - 1
        cases -= token.text == "END"
    return len(tokens) - 1


def _conditions(body: str, tokens: list[_Token], make: _Make) -> Iterator[Mutant]:
    """A condition of WHERE and of AND becomes true, of OR false; the whole condition of IF and CASE its contrary."""
    for number, token in enumerate(tokens[:-1]):
        first = tokens[number + 1]
        if token.text in _CONDITION_STARTS and first.text not in ("CONFLICT",):
            last = tokens[_last(tokens, number + 1, _ENDS_OF_CONDITION)]
            yield make("condition", first.start, last.end, "false" if token.text == "OR" else "true")
        if token.text in ("IF", "ELSIF", "WHEN") and token.depth >= 0:
            then = next((t for t in tokens[number:] if t.text == "THEN" and t.depth == token.depth), None)
            if then is not None:
                yield make(
                    "contrary", first.start, then.start, f"({body[first.start : then.start].rstrip()}) IS NOT TRUE "
                )


def _statements(body: str, tokens: list[_Token], make: _Make) -> Iterator[Mutant]:
    """A statement or an assignment is left out."""
    for number, token in enumerate(tokens[:-1]):
        begins = not number or tokens[number - 1].text in (";", "BEGIN", "THEN", "ELSE", "LOOP")
        is_dropped = token.text in _DROPPED or tokens[number + 1].text == ":="
        if begins and is_dropped and token.depth == 0:
            end = next((t for t in tokens[number:] if t.text == ";" and t.depth == 0), None)
            if end:  # a statement of PL/pgSQL; a function in SQL may be one statement without an end
                yield make("statement", token.start, end.end, "NULL;")


def _values(body: str, tokens: list[_Token], make: _Make) -> Iterator[Mutant]:
    """A column that UPDATE … SET assigns keeps its value."""
    for number, at, end in _assignments(tokens):
        same = _same(body, tokens, number, tokens[at].text)
        yield make("value", tokens[at + 2].start, tokens[end].end, same)


def _assignments(tokens: list[_Token]) -> Iterator[tuple[int, int, int]]:
    """Return the numbers of SET, of the column and of the last token of the value, for each column of UPDATE … SET."""
    for number, token in enumerate(tokens[:-1]):
        if token.text != "SET" or tokens[number + 2].text != "=":
            continue
        at = number + 1
        while True:
            end = _last(tokens, at, _ENDS_OF_VALUE)
            yield number, at, end
            if tokens[end + 1].text != ",":
                break
            at = end + 2


def _same(body: str, tokens: list[_Token], number: int, column: str) -> str:
    """Return the column of the row as it was: of `UPDATE hold h SET`, or `INSERT INTO hold AS h … DO UPDATE SET`."""
    before = tokens[number - 1].text
    alias = re.search(r"INSERT INTO [\w.]+ AS (\w+)", body) if before == "UPDATE" else None
    return f"{alias[1] if alias else before}.{column}"
