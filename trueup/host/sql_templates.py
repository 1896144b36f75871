"""SQL templates: how what the host has gets into our SQL.

`{{subscription}}`        a table, or the type of an id
`s.{{usage_log.section}}` what a row has there: a column, or what the mapping says instead
`{{literal usage_log}}`   a name as a string
`{{usage_log.section else 'x'}}` what stands for it where the host keeps no such column
`{{if usage_log.metadata}} … {{else}} … {{end}}` one of both, by whether the host has it; not nested
`{{include plan_tokens}}`  on a line of its own, what stands in sql_parts/plan_tokens.sql; a name after that stands for
                          its `{{row}}`
"""

import re
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Protocol

from trueup.host.setting_values import quote_literal

_INCLUDE = re.compile(r"^ *\{\{include (?P<part>[a-z_]+)(?: (?P<row>\w+))?\}\}\n", re.MULTILINE)
_CHOICE = re.compile(
    r"\{\{if (?P<name>[a-z_.]+)\}\}(?P<then>.*?)(?:\{\{else\}\}(?P<otherwise>.*?))?\{\{end\}\}", re.DOTALL
)
_PLACEHOLDER = re.compile(
    r"(?:\b(?P<alias>\w+)\.)?\{\{(?P<literal>literal )?(?P<name>[a-z_.]+)(?: else (?P<otherwise>[^{}]+))?\}\}"
)


class Names(Protocol):
    """What templates ask of a mapping. Each raises KeyError for a name that there is none of."""

    def has(self, name: str) -> bool:
        """Return whether the host has it, in whatever form."""

    def stores(self, name: str) -> bool:
        """Return whether the host has a column for it."""

    def sql(self, name: str, alias: str | None) -> str:
        """Return it as SQL."""


def chosen(template: str, names: Names) -> str:
    """Return the template with its parts, and without its choices."""

    def choose(match: re.Match[str]) -> str:
        return match["then"] if names.has(match["name"]) else match["otherwise"] or ""

    return _CHOICE.sub(choose, with_parts(template))


def with_parts(template: str) -> str:
    """Return the template with what it includes."""
    return _INCLUDE.sub(lambda match: _part(match["part"], match["row"]), template)


@cache
def _part(name: str, row: str | None) -> str:
    part = resources.files("trueup.host").joinpath("sql_parts", f"{name}.sql").read_text(encoding="utf-8")
    return part if row is None else part.replace("{{row}}", row)


def fill(template: str, names: Names, *, escape: Callable[[str], str] = str) -> str:
    """Return the template with the host's names in it. `escape`: applied to each of them. Raises KeyError."""

    def replacement(match: re.Match[str]) -> str:
        if match["otherwise"] is not None and not names.stores(match["name"]):
            return str(match["otherwise"])
        found = names.sql(match["name"], match["alias"])
        return escape(quote_literal(found) if match["literal"] else found)

    return _PLACEHOLDER.sub(replacement, chosen(template, names))


def named_fields(template: str, names: Names) -> list[tuple[str, str]]:
    """Return what a template reads of each noun, as (noun, field), each once."""
    found = (match["name"].partition(".") for match in _PLACEHOLDER.finditer(chosen(template, names)))
    return list(dict.fromkeys((noun, field) for noun, _, field in found if field))
