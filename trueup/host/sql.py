"""SQL templates: Jinja2, filled with the names of the host's tables and columns.

A template sees each noun of the mapping, and the types of ids:

`{{ subscription }}`            the quoted table, or a subquery in place of a table that the host lacks
`s.{{ subscription.user_id }}`  a field that is a column in every mapping
`{{ usage_log.section("l") }}`  the value of row `l` for a field that may be another setting than a column;
                                without an alias: the value of the only table in scope
`{{ usage_log.section.column("l") or "''" }}`  the column; nothing if the host lacks it
`{% if usage_log.metadata %}`   whether the host has a table or a field, in any form
`{{ time_zone }}`               the zone of the host's times without one, as an SQL string
`{{ usage_log | literal }}`     the name as an SQL string
`{{ uncountable }}`             `UNCOUNTABLE`; `{{ no_limit }}`: `NO_LIMIT`
`{{ trueup.charge }}`           a table of trueup's own, if the template also runs in a database without them

Files are found below the package: `{% from "host/rows.sql" import window_start %}`. Several statements share a macro.
A file that has only macros is not run itself.
"""

from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any

from jinja2 import BytecodeCache, Environment, PackageLoader, StrictUndefined, Template, TemplateRuntimeError
from jinja2.bccache import Bucket
from sqlalchemy import TextClause, text

from trueup.host.fields import FIELDS, NOUNS, Noun
from trueup.host.mapping import HostMapping
from trueup.host.setting_values import Compared, Constant, Given, quote_identifier, quote_literal, quote_table, sql_of

# It replaces a colon in a host's name while a statement is rendered. No name or value of a mapping can contain it.
_COLON = "\x00"
UNCOUNTABLE = 2**62 - 1
"""The consumed tokens of a user whose usage can't be counted, because its sum or its negative is at least this.

It closes the gate, and two such figures still add up to a bigint. A row with more tokens is counted as this many.
"""
NO_LIMIT = 2**62
"""The tokens that a subscription without a limit includes. No usage that can be counted reaches it."""
OnRead = Callable[[Noun, str], None]
"""A callback with the noun and the field of each read by a template."""


class OwnTables:
    """The SQL names of trueup's own tables. `installed`: the database has them and trueup's functions."""

    installed = True

    def __getattr__(self, name: str) -> str:
        return f"trueup.{name}"


INSTALLED = OwnTables()


class HostField:
    """A field of a host's row."""

    def __init__(self, name: str, given: Given, sql: Callable[[str | None], str], *, is_always_column: bool) -> None:
        self._name = name
        self._given = given
        self._sql = sql
        self._is_always_column = is_always_column

    def __call__(self, alias: str | None = None) -> str:
        """Return the field's value in the row of that alias, as SQL. None: for the only table in scope."""
        return self._sql(alias)

    def column(self, alias: str | None = None) -> str | None:
        """Return the column of the row as SQL; None if the mapping has no column for the field."""
        return self._sql(alias) if isinstance(self._given, str) else None

    def __str__(self) -> str:
        if not self._is_always_column:
            raise TemplateRuntimeError(f'host.{self._name} may be no column. Write {{{{ {self._name}("alias") }}}}.')
        return self._sql(None)

    def __bool__(self) -> bool:
        """Whether the host has the field. Constants don't count, except the tokens that a subscription includes."""
        return self._given is not None and (
            self._name == "subscription.tokens_included" or not isinstance(self._given, Constant)
        )


class HostTable:
    """A table of the host, with its fields as attributes. Jinja2 refuses an unknown field."""

    def __init__(self, mapping: HostMapping, noun: Noun, escape: Callable[[str], str], on_read: OnRead) -> None:
        self._mapping = mapping
        self._noun = noun
        self._names = getattr(mapping, noun)
        self._escape = escape
        self._on_read = on_read

    def __str__(self) -> str:
        if self._names.table is not None:
            return self._escape(quote_table(self._names.table))
        if self._noun in ("token_plan", "full_plan"):
            nulls = (f"CAST(NULL AS {entry.sql_type}) AS {field}" for field, entry in FIELDS["full_plan"].items())
            return f"(SELECT {', '.join(nulls)} WHERE false)"
        if self._noun != "user":
            raise TemplateRuntimeError(f"host.{self._noun} is not mapped. Ask {{% if {self._noun} %}} first.")
        subscription = self._mapping.subscription
        return self._escape(
            f"(SELECT s.{quote_identifier(subscription.user_id)} AS id, CAST(NULL AS text) AS username, "
            f"CAST(NULL AS text) AS email FROM {quote_table(subscription.table)} s)"
        )

    def __bool__(self) -> bool:
        return self._names.table is not None

    def __getattr__(self, field: str) -> HostField:
        found = type(self._names).model_fields.get(field)
        if found is None or field == "table":
            raise AttributeError(field)
        given = getattr(self._names, field)
        name = f"{self._noun}.{field}"
        is_plan_key = field in ("token_plan_id", "full_plan_id")
        is_always_column = found.annotation is str and not is_plan_key

        def sql(alias: str | None) -> str:
            self._on_read(self._noun, field)
            return self._escape(self._sql(field, given, alias))

        return HostField(name, given, sql, is_always_column=is_always_column)

    def _sql(self, field: str, given: Given, alias: str | None) -> str:
        if field == "completed_status":
            return str(given)
        if not self._mapping.has_plan_of(field):
            return "CAST(NULL AS text)"
        counts = self._mapping.usage_log.counts
        if (self._noun, field) == ("usage_log", "success") and counts is not None:
            given = counts
        # The subquery in place of a missing table uses trueup's names of the fields as its columns.
        return sql_of(field if self._names.table is None else given, alias, FIELDS[self._noun][field].sql_type)


class Subscription(HostTable):
    """The subscriptions, with how their plans and their counter are read."""

    @property
    def adds_plans(self) -> bool:
        """Whether a subscription includes the tokens of its token plan and of its full plan."""
        return bool(self._names.plans == "sum")

    @property
    def counts_up(self) -> bool:
        """Whether the counter shows used tokens."""
        return bool(self._names.counts == "up")

    @property
    def anchor(self) -> str | None:
        """Return where repeating periods begin: "start_date" or "first"; None: periods do not repeat."""
        return None if self._names.period is None else str(self._names.period.anchor)

    @property
    def period_zone(self) -> str:
        """Return the zone in which the days of repeating periods begin, as an SQL string."""
        period = self._names.period
        return quote_literal((period and period.time_zone) or self._mapping.time_zone or "UTC")

    @property
    def has_plain_period(self) -> bool:
        """Whether period and plans are columns, and times without a zone are in UTC."""
        plans = (self._names.token_plan_id, self._names.full_plan_id)
        return (
            self._names.period is None
            and self._names.tokens_included is None
            and (self._mapping.time_zone or "UTC") == "UTC"
            and all(isinstance(given, str | None) for given in plans)
        )

    @property
    def is_kept_by_host(self) -> bool:
        """Whether the host lowers the counter for each log row, also for the rows of trueup's calls."""
        return "host" in (self._names.counter_kept_by, self._mapping.usage_log.record)

    def means_unlimited(self, of: str) -> str | None:
        """Return the condition of "no limit" on a value, such as `= -1`. `of`: "included" or "counter"."""
        given = getattr(self._names.unlimited, of, None)
        return None if given is None else "IS NULL" if given == "null" else f"= {given}"


class UsageLog(HostTable):
    """The usage log, with the columns and values of trueup's own rows."""

    def written(self, alias: str | None = None) -> str:
        """Return the columns that trueup writes; with an alias: their values, from a row with all fields."""
        log = self._mapping.usage_log
        if alias is None:
            return self._escape(", ".join(map(quote_identifier, log.written)))
        values = [f"{alias}.{field}" for field in log.written_fields]
        if log.section_type is not None and "section" in log.written_fields:
            place = log.written_fields.index("section")
            values[place] = f"CAST({alias}.section AS {quote_table(log.section_type)})"
        if isinstance(log.counts, Compared):
            # jsonb_populate_record converts the value to the column's type.
            name, succeeded = quote_literal(log.counts.column), quote_literal(log.counts.equals[0])
            failed = quote_literal(log.counts.failed) if log.counts.failed is not None else succeeded
            values.append(
                f"(jsonb_populate_record(CAST(NULL AS {quote_table(log.table)}), jsonb_build_object({name}, "
                f"CASE WHEN {alias}.success THEN {succeeded} ELSE {failed} END))).{quote_identifier(log.counts.column)}"
            )
        return self._escape(", ".join(values))

    @property
    def is_written_by_host(self) -> bool:
        """Whether the host writes the rows of trueup's calls."""
        return self._mapping.usage_log.record == "host"

    def counted(self) -> str:
        """Return the names of the counted columns as SQL strings."""
        return self._escape(", ".join(map(quote_literal, self._mapping.counted_columns())))

    def records_failure(self) -> str:
        """Return, as SQL, whether a row can record that its call failed."""
        return str(self._mapping.usage_log.records_failure).lower()


def render_sql(template: str, mapping: HostMapping, **values: object) -> str:
    """Return the SQL script of a template. `values`: further names for the template."""
    return _template(template, mapping, False, INSTALLED).render(values)


def render_file(name: str, mapping: HostMapping) -> str:
    """Return the SQL script of a template file below the package."""
    return _environment(mapping, False, INSTALLED).get_template(name).render()


def render_statement(template: str, mapping: HostMapping, own: OwnTables = INSTALLED, **values: object) -> TextClause:
    """Return a template as a statement with `:parameters`. A colon in a host's name begins no parameter.

    `values`: further names for the template.
    """
    return text(_template(template, mapping, True, own).render(values).replace(_COLON, "\\:"))


def fields_read(templates: list[str], mapping: HostMapping, own: OwnTables, **values: object) -> list[tuple[Noun, str]]:
    """Return the fields of the host that templates read, as (noun, field), each once. `values`: further names."""
    found: dict[tuple[Noun, str], None] = {}
    environment = _make_environment(mapping, False, own, lambda noun, field: found.setdefault((noun, field)))
    for template in templates:
        environment.from_string(template).render(values)
    return list(found)


class _CompiledFiles(BytecodeCache):
    """The compiled template files. They are the same for every mapping, so each is compiled once in a process."""

    def __init__(self) -> None:
        self._compiled: dict[str, CodeType] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        bucket.code = self._compiled.get(bucket.key)

    def dump_bytecode(self, bucket: Bucket) -> None:
        if bucket.code is not None:
            self._compiled[bucket.key] = bucket.code


_COMPILED_FILES = _CompiledFiles()


@lru_cache(maxsize=256)
def _template(template: str, mapping: HostMapping, is_statement: bool, own: OwnTables) -> Template:
    return _environment(mapping, is_statement, own).from_string(template)


@lru_cache(maxsize=16)
def _environment(mapping: HostMapping, is_statement: bool, own: OwnTables) -> Environment:
    return _make_environment(mapping, is_statement, own, lambda noun, field: None)


def _make_environment(mapping: HostMapping, is_statement: bool, own: OwnTables, on_read: OnRead) -> Environment:
    environment = Environment(
        loader=PackageLoader("trueup", "."),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - SQL, whose names are quoted
        auto_reload=False,
        bytecode_cache=_COMPILED_FILES,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    def escape(name: str) -> str:
        return name.replace(":", _COLON) if is_statement else name

    def literal(value: Any) -> str:
        return quote_literal(str(value))

    environment.filters["literal"] = literal
    for noun in NOUNS:
        kind = {"usage_log": UsageLog, "subscription": Subscription}.get(noun, HostTable)
        environment.globals[noun] = kind(mapping, noun, escape, on_read)
    environment.globals.update(
        user_id_type=mapping.user_id_type,
        usage_log_id_type=mapping.usage_log_id_type,
        time_zone=quote_literal(mapping.time_zone or "UTC"),
        trueup=own,
        uncountable=UNCOUNTABLE,
        no_limit=NO_LIMIT,
    )
    return environment
