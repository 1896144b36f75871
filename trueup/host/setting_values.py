"""The values of settings under [host]: a name in the host's database, or a replacement for a missing column.

A column is given by its name. `{value = …}` is a constant for every row, `{column = "…", equals = "…"}` compares a
column, and `{expression = "…"}` is SQL over the row, with columns as `{row}.column`. A replacement is never written,
except a compared column of the usage log.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

DEFAULT_SCHEMA = "public"
_MAX_IDENTIFIER_BYTES = 63  # PostgreSQL's NAMEDATALEN - 1
_MAX_COUNT = 2**31 - 1
# Below half of the range of bigint, so that sums with usage can't overflow.
_MAX_TOKENS = 2**62 - 1


def check_identifier(name: str) -> str:
    """Return the name. Raises ValueError if PostgreSQL or trueup's functions can't use it."""
    if not name or "\x00" in name or len(name.encode()) > _MAX_IDENTIFIER_BYTES:
        raise ValueError(f"{name!r} is no PostgreSQL name: give 1 to {_MAX_IDENTIFIER_BYTES} bytes")
    if "$$" in name:
        raise ValueError(f"{name!r} contains $$, which would end the bodies of trueup's functions")
    return name


def _check_table(name: str) -> str:
    if name.count(".") > 1:
        raise ValueError(f"{name!r} is no table name: give TABLE or SCHEMA.TABLE")
    for part in name.split("."):
        check_identifier(part)
    return name


def _check_value(value: str) -> str:
    if "\x00" in value or "$$" in value:
        raise ValueError(f"{value!r} contains NUL or $$, which would end the bodies of trueup's functions")
    return value


Column = Annotated[str, AfterValidator(check_identifier)]
Value = Annotated[str, AfterValidator(_check_value)]
Table = Annotated[str, AfterValidator(_check_table)]


def quote_identifier(name: str) -> str:
    """Quote a column name for use in SQL text."""
    return '"' + name.replace('"', '""') + '"'


def quote_table(name: str) -> str:
    """Return a table's name as SQL text, quoted and with its schema: `DEFAULT_SCHEMA` if the name gives none.

    trueup's search path holds no schema in which another role could make a table of that name.
    """
    schema, _, table = name.rpartition(".")
    return f"{quote_identifier(schema or DEFAULT_SCHEMA)}.{quote_identifier(table)}"


def quote_literal(value: str) -> str:
    """Quote a string for use in SQL text, even if standard_conforming_strings is off."""
    quoted = value.replace("'", "''").replace("\\", r"\\")
    return f"E'{quoted}'" if "\\" in value else f"'{quoted}'"


class _Setting(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Constant(_Setting):
    """A constant for every row, for a column that the host lacks."""

    value: StrictBool | StrictInt | StrictStr


def _as_texts(given: object) -> object:
    """Return one value or a list of values as the texts that PostgreSQL would write."""
    values = given if isinstance(given, list | tuple) else [given]
    return tuple(map(_as_text, values))


def _as_text(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else value


class Compared(_Setting):
    """True for a row whose column has one of these values. trueup writes the first value for a successful call.

    `failed`: the value that trueup writes for a failed call. None: failed calls get no row.
    """

    column: Column
    equals: Annotated[tuple[Value, ...], BeforeValidator(_as_texts)]
    failed: Annotated[Value | None, BeforeValidator(_as_text)] = None


class Expression(_Setting):
    """SQL over the row, such as `{row}.base + {row}.bonus`."""

    expression: StrictStr

    def over(self, alias: str | None) -> str:
        """Return the expression as SQL for the row of that alias. None: for the only table in scope."""
        row = "" if alias is None else f"{alias}."
        return f"({''.join(f'{row}{column}' if column else text for text, column in _tokens(self.expression))})"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the expression names, each once."""
        named = (column for _, column in _tokens(self.expression) if column)
        return tuple(dict.fromkeys(_plain_name(column) for column in named))


# Each match is a string, a quoted name, a column of the row, a character to check, or any other text.
_TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")+" | \{row\}\.(?P<column>"(?:[^"]|"")+" | [A-Za-z_][A-Za-z0-9_$]*)"""
    r"""| -- | /\* | [;$(){}'"\x00\\] | [-/] | [^-'"{}();$/\x00\\]+ """,
    re.VERBOSE,
)
_SPECIAL_STRING = re.compile(r"(?i)(?:\be|\bu&)$")


def _tokens(expression: str) -> Iterator[tuple[str, str | None]]:
    """Yield the parts of an expression, each with the column of the row that it names, or None."""
    return ((match[0], match["column"]) for match in _TOKEN.finditer(expression))


def _plain_name(column: str) -> str:
    return column[1:-1].replace('""', '"') if column.startswith('"') else column.lower()


def _check_expression(expression: str) -> None:
    """Refuse text that is not one self-contained expression. The setup checks in the database whether it is SQL."""
    if not expression.strip():
        raise ValueError("expression is empty")
    depth, before = 0, ""
    for token, column in _tokens(expression):
        if column is not None:
            check_identifier(_plain_name(column))
        elif "$$" in token or "\x00" in token:
            raise ValueError("expression contains NUL or $$, which would end the bodies of trueup's functions")
        elif token in ("{", "}"):
            raise ValueError("expression: name the row's columns as {row}.column, and write no other braces")
        elif token in (";", "--", "/*", "$", "\\"):
            raise ValueError(f"expression contains {token}: write one SQL expression, without comments")
        elif token in ("'", '"'):
            raise ValueError(f"expression: a {token} is left open")
        elif token[0] in "'\"" and _SPECIAL_STRING.search(before):
            raise ValueError("expression: write strings and names without E or U& before them")
        depth += (token == "(") - (token == ")")
        if depth < 0:
            raise ValueError("expression: a ) too many")
        before = token
    if depth:
        raise ValueError("expression: a ( is left open")


_KINDS: dict[str, type[Constant | Compared | Expression]] = {
    "value": Constant,
    "column": Compared,
    "expression": Expression,
}
_WAYS: dict[type, str] = {Compared: '{column = "NAME", equals = "VALUE"}', Expression: '{expression = "…"}'}


def _either(
    *,
    column: bool = True,
    value: str = "",
    fits: Callable[[Any], bool] | None = None,
    others: tuple[type, ...] = (),
    optional: bool = False,
) -> BeforeValidator:
    """Accept a column's name, a constant that fits (`value`: an example), or one of the other kinds."""
    ways = [*(["a column's name"] if column else []), *([f"{{value = {value}}}"] if value else [])]
    ways += [_WAYS[kind] for kind in others]
    kinds = (*((Constant,) if fits else ()), *others)
    wanted = f"give {' or '.join(ways)}"

    def read(setting: object) -> object:
        if setting is None and optional:
            return None
        if column and isinstance(setting, str):
            return check_identifier(setting)
        if isinstance(setting, dict):
            kind = next((kind for key, kind in _KINDS.items() if key in setting), None)
            setting = _made(kind, setting) if kind in kinds else None
        if not isinstance(setting, kinds):
            raise ValueError(wanted)
        if isinstance(setting, Constant) and not (fits and fits(setting.value)):
            raise ValueError(wanted)
        if isinstance(setting, Compared):
            _check_compared(setting)
        if isinstance(setting, Expression):
            _check_expression(setting.expression)
        return setting

    return BeforeValidator(read)


def _made(kind: Any, setting: dict[str, Any]) -> object:
    # The only document is the empty one. It becomes a string, because a dict has no hash.
    given = setting | {"value": "{}"} if setting.get("value") == {} else setting
    try:
        made: object = kind.model_validate(given)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, fault['loc'][:1]))}: {fault['msg']}") from None
    return made


def _check_compared(setting: Compared) -> None:
    if not setting.equals:
        raise ValueError("equals: give one value or more")
    if setting.failed in setting.equals:
        raise ValueError(f"failed: {setting.failed!r} would count; give a value that is not in equals")


def _only_read(setting: object) -> object:
    """Refuse a value for failed calls, for a column that trueup only reads."""
    if isinstance(setting, Compared) and setting.failed is not None:
        raise ValueError("failed: leave it out; trueup never writes this column")
    return setting


def _is_text(value: object) -> bool:
    return isinstance(value, str) and _check_value(value) == value


def _is_count(most: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


Flag = Annotated[str | Constant, _either(value="true", fits=lambda value: value is True)]
Active = Annotated[
    str | Constant | Compared | Expression,
    AfterValidator(_only_read),
    _either(value="true", fits=lambda value: value is True, others=(Compared, Expression)),
]
Words = Annotated[str | Constant, _either(value='"…"', fits=_is_text)]
Count = Annotated[str | Constant, _either(value="0", fits=_is_count(_MAX_COUNT))]
Document = Annotated[str | Constant, _either(value="{}", fits=lambda value: value == "{}")]
End = Annotated[str | Constant, _either(value='"infinity"', fits=lambda value: value == "infinity")]
PlanTokens = Annotated[
    str | Constant | Expression | None,
    _either(value="0", fits=_is_count(_MAX_TOKENS), others=(Expression,), optional=True),
]
Counts = Annotated[Compared | Expression | None, _either(column=False, others=(Compared, Expression), optional=True)]

PlanRule = Literal["first", "sum"] | None
Keeper = Literal["host", "trueup"] | None
Direction = Literal["up", "down"] | None


class NoLimit(_Setting):
    """The values that mean no limit. `included`: of the included tokens. `counter`: of the counter; None: no value.

    "null" stands for null. A counter of 0 or more is a number of tokens, so only a negative one can mean no limit.
    """

    included: StrictInt | Literal["null"] | None = None
    counter: StrictInt | Literal["null"] | None = None


def _no_limit(given: object) -> object:
    """Read `-1` as the value of the included tokens. Raises ValueError for a value that is a number of tokens."""
    wanted = 'give -1, 0 or "null", or {included = -1, counter = -1}'
    if given is None or isinstance(given, NoLimit):
        return given
    try:
        read = NoLimit.model_validate(given if isinstance(given, dict) else {"included": given})
    except ValidationError:
        raise ValueError(wanted) from None
    if read.included is read.counter is None or (isinstance(read.included, int) and read.included > 0):
        raise ValueError(f"{wanted}; a positive number is a number of tokens")
    if isinstance(read.counter, int) and read.counter >= 0:
        raise ValueError(f'counter: a counter of {read.counter} is a number of tokens; give a negative one or "null"')
    return read


Unlimited = Annotated[NoLimit | None, BeforeValidator(_no_limit)]


def _check_zone(name: str | None) -> str | None:
    """Return the name of a time zone. Raises ValueError if there is no such zone."""
    if name is None:
        return None
    try:
        return ZoneInfo(name).key
    except (ZoneInfoNotFoundError, ValueError, OSError):
        near = difflib.get_close_matches(name, available_timezones(), n=1)
        hint = f"did you mean {near[0]}?" if near else 'give a name such as "Asia/Tehran" or "UTC"'
        raise ValueError(f"{name!r} is no time zone: {hint}") from None


TimeZone = Annotated[str | None, AfterValidator(_check_zone)]


class Period(_Setting):
    """How a subscription's period repeats.

    `anchor`: "start_date", each month on the day of the start (the month's last day if it has no such day), or
    "first", the first of each calendar month. `time_zone`: in which days begin; None: the mapping's.
    """

    every: Literal["month"]
    anchor: Literal["start_date", "first"] = "start_date"
    time_zone: TimeZone = None


def _period(given: object) -> object:
    """Raises ValueError for anything but a period."""
    if given is None or isinstance(given, Period):
        return given
    try:
        return Period.model_validate(given)
    except ValidationError as error:
        zone = next((fault["msg"] for fault in error.errors() if fault["loc"] == ("time_zone",)), None)
        wanted = 'give {every = "month", anchor = "start_date" or "first", time_zone = "Asia/Tehran"}'
        raise ValueError(f"time_zone: {zone}" if zone else wanted) from None


Recurring = Annotated[Period | None, BeforeValidator(_period)]


def read_counter(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a subscription with `counter` read as the column and its direction."""
    if "counter" not in given:
        return given
    rest = {name: value for name, value in given.items() if name != "counter"}
    counter = given["counter"]
    if "tokens_remaining" in rest:
        raise ValueError("counter: give counter or tokens_remaining, not both")
    if isinstance(counter, str):
        return rest | {"tokens_remaining": counter}
    if not isinstance(counter, dict) or "column" not in counter or not set(counter) <= {"column", "counts"}:
        raise ValueError('counter: give a column\'s name, or {column = "NAME", counts = "up"}')
    if counter.get("counts", "down") not in ("up", "down"):
        raise ValueError('counter: counts is "up" (used tokens) or "down" (tokens left)')
    return rest | {"tokens_remaining": counter["column"], "counts": counter.get("counts")}


def read_plan_rule(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a subscription with a `tokens_included` of "sum" or "first" read as the rule of plans."""
    if given.get("tokens_included") not in ("sum", "first"):
        return given
    return given | {"tokens_included": None, "plans": given["tokens_included"]}


Given = str | Constant | Compared | Expression


def sql_of(given: Given, alias: str | None, sql_type: str) -> str:
    """Return the setting's value of a row, as SQL. `alias` None: for the only table in scope."""
    row = "" if alias is None else f"{alias}."
    if isinstance(given, str):
        return f"{row}{quote_identifier(given)}"
    if isinstance(given, Expression):
        return given.over(alias)
    if isinstance(given, Compared):
        values = ", ".join(map(quote_literal, given.equals))
        return f"(CAST({row}{quote_identifier(given.column)} AS text) IN ({values}))"
    if isinstance(given.value, str):
        return f"CAST({quote_literal(given.value)} AS {sql_type})"
    return str(given.value).lower()


def columns_of(given: Given | None) -> tuple[str, ...]:
    """Return the host's columns that a setting names."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Compared):
        return (given.column,)
    return given.columns if isinstance(given, Expression) else ()
