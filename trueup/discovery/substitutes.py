"""What stands for columns and tables that a host does not have, where that can be told for sure."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from trueup.discovery.catalog import HostColumn, HostTable
from trueup.discovery.match_tables import Candidate
from trueup.discovery.samples import Sampler
from trueup.discovery.vocabulary import (
    ACTIVE_WORDS,
    DELETED_NAMES,
    FAILED_WORDS,
    FIELDS,
    OK_WORDS,
    STATUS_NAMES,
    STATUS_OF_SUBSCRIPTION,
    Noun,
    nearness,
    plain,
)
from trueup.host.columns import quote_identifier, quote_literal

# Nothing is decided by these: a row of the log, or a view, has this in place of the column.
_CONSTANTS: dict[tuple[Noun, str], Any] = {
    ("user", "username"): "",
    ("user", "email"): "",
    ("token_plan", "name"): "",
    ("token_plan", "is_active"): True,
    ("full_plan", "name"): "",
    ("full_plan", "is_active"): True,
    ("usage_log", "section"): "other",
    ("usage_log", "prompt_tokens"): 0,
    ("usage_log", "completion_tokens"): 0,
    ("usage_log", "response_time_ms"): 0,
    ("usage_log", "model_name"): "",
    ("usage_log", "metadata"): {},
}
# Who may spend is decided by these: a person has to say that it is so.
OTHERWISE: dict[tuple[Noun, str], str] = {
    ("usage_log", "success"): "success = {value = true} if all rows count",
    ("subscription", "is_active"): (
        'is_active = {column = "COLUMN", equals = "VALUE"} if a status says so, or is_active = {value = true} if all '
        "subscriptions are"
    ),
    ("subscription", "end_date"): 'end_date = {value = "infinity"} if none ends',
    ("full_plan", "duration_days"): "duration_days = {value = 30} if all plans last so long",
}
_LEAST = 0.6
_PLAIN = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A setting that is no column's name. `instead_of`: the field for which it stands."""

    field: str
    instead_of: str
    value: Any
    why: str


def stand_ins(noun: Noun, candidate: Candidate, sampler: Sampler) -> list[StandIn]:
    """Return what stands for columns that were not found. A column of a wrong type is left to a person."""
    table, matches = candidate.table, candidate.matches
    found = [
        StandIn(
            field=field,
            instead_of=field,
            value={"value": _CONSTANTS[noun, field]},
            why=f"{table.setting} has no column like {field}",
        )
        for field in FIELDS[noun]
        if (noun, field) in _CONSTANTS and field not in matches.found and field not in matches.wrong_type
    ]
    if noun == "usage_log" and "success" not in matches.found:
        found += _counts(candidate, sampler)
    if noun == "subscription" and "is_active" not in {*matches.found, *matches.wrong_type}:
        found += _active(candidate, sampler)
    return found


def _active(candidate: Candidate, sampler: Sampler) -> list[StandIn]:
    """Return what says that a subscription is in force, if one status says it in a word. All other values deny."""
    told = _told(candidate, sampler, STATUS_OF_SUBSCRIPTION, ACTIVE_WORDS)
    if told is None:
        return []
    column, word = told
    why = f"{column.name} is {column.type}, and {word!r} its only value that says so: with any other nobody may spend"
    value: dict[str, Any] = {"column": column.name, "equals": word}
    gone = deleted_column(candidate.table)
    if gone is not None:
        value = {"expression": f"{_of_row(column.name)} = {quote_literal(word)} AND {_of_row(gone)} IS NULL"}
        why += f", nor with a {gone}"
    return [StandIn(field="is_active", instead_of="is_active", value=value, why=why)]


def _of_row(name: str) -> str:
    """Return a column as an expression of the mapping names it."""
    return "{row}." + (name if _PLAIN.fullmatch(name) else quote_identifier(name))


def deleted_column(table: HostTable) -> str | None:
    """Return the column that says when a row was deleted, if the host keeps such rows."""
    names = (column.name for column in table.columns.values() if column.kind == "time")
    return next((name for name in names if plain(name) in DELETED_NAMES), None)


def _counts(candidate: Candidate, sampler: Sampler) -> list[StandIn]:
    """Return what says that a row counts, if one column says it in a word."""
    told = _told(candidate, sampler, STATUS_NAMES, OK_WORDS)
    if told is None:
        return []
    column, word = told
    failed = sampler.word(candidate.table, column.name, FAILED_WORDS)
    value = {"column": column.name, "equals": word} | ({} if failed is None else {"failed": failed})
    why = f"{column.name} is {column.type}, and {word!r} its only value that says so"
    return [StandIn(field="counts", instead_of="success", value=value, why=why)]


def _told(
    candidate: Candidate, sampler: Sampler, names: Collection[str], words: Sequence[str]
) -> tuple[HostColumn, str] | None:
    """Return the column called so that says it in one of these words, and the word. None: none does, or several."""
    taken = {match.column.name for match in candidate.matches.found.values()}
    told = []
    for column in candidate.table.columns.values():
        if column.kind == "text" and column.name not in taken and plain(column.name) in names:
            word = sampler.word(candidate.table, column.name, words)
            told += [(column, word)] if word is not None else []
    return told[0] if len(told) == 1 else None


def included_column(candidate: Candidate) -> tuple[str, float, str] | None:
    """Return the column of a subscription that says what it includes, with how sure that is, and why."""
    taken = {match.column.name for match in candidate.matches.found.values()}
    wanted = FIELDS["token_plan"]["tokens_included"]
    scored = [
        (*nearness(column.name, "tokens_included", wanted.names), column)
        for column in candidate.table.columns.values()
        if column.kind in wanted.kinds and column.name not in taken and column.name not in candidate.table.references
    ]
    if not scored:
        return None
    score, why, column = max(scored, key=lambda one: one[0])
    return (column.name, score, f"{why}, {column.type}") if score >= _LEAST else None
