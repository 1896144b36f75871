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
    OK_WORDS,
    SOUGHT_FIELDS,
    STATUS_NAMES,
    STATUS_OF_SUBSCRIPTION,
    nearness,
    plain,
)
from trueup.host.fields import Noun
from trueup.host.setting_values import quote_identifier, quote_literal

_MIN_SCORE = 0.6
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
            value={"value": entry.substitute},
            why=f"{table.setting} has no column like {field}",
        )
        for field, entry in SOUGHT_FIELDS[noun].items()
        if entry.substitute is not None and field not in matches.found and field not in matches.wrong_type
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
    wanted = SOUGHT_FIELDS["token_plan"]["tokens_included"]
    scored = [
        (*nearness(column.name, "tokens_included", wanted.names), column)
        for column in candidate.table.columns.values()
        if column.kind in wanted.kinds and column.name not in taken and column.name not in candidate.table.references
    ]
    if not scored:
        return None
    score, why, column = max(scored, key=lambda one: one[0])
    return (column.name, score, f"{why}, {column.type}") if score >= _MIN_SCORE else None
