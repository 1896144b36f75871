"""Substitutes for columns and tables that a host does not have, if they are certain."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from trueup.discovery.catalog import HostColumn, HostTable
from trueup.discovery.match_columns import SOUGHT_FIELDS, nearness, plain
from trueup.discovery.match_tables import Candidate
from trueup.discovery.samples import Sampler
from trueup.host.fields import Noun
from trueup.host.setting_values import quote_identifier, quote_literal

# The values and names of hosts, compared without case.
PAID_WORDS = ("completed", "complete", "succeeded", "success", "successful", "paid", "captured", "settled", "confirmed")
ACTIVE_WORDS = ("active", "enabled")
OK_WORDS = ("ok", "success", "successful", "succeeded", "completed", "complete", "done", "finished")
FAILED_WORDS = ("failed", "failure", "fail", "error", "errored")
SUBSCRIPTION_STATUS_NAMES = {"status", "state", "subscription_status", "subscription_state"}
CALL_STATUS_NAMES = {
    *("status", "state", "outcome", "result", "success", "ended"),
    *("finish_status", "call_status", "request_status"),
}
DELETED_NAMES = {"deleted_at", "deleted_on", "discarded_at", "removed_at"}

_MIN_SCORE = 0.6
_PLAIN = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A setting that is not a column's name. `instead_of`: the field that it replaces."""

    field: str
    instead_of: str
    value: Any
    why: str


def stand_ins(noun: Noun, candidate: Candidate, sampler: Sampler) -> list[StandIn]:
    """Return the substitutes for columns that were not found. A column of a wrong type is left to a person."""
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
    """Return the condition for an active subscription, if one status value means it. All other values deny."""
    found = _status_column(candidate, sampler, SUBSCRIPTION_STATUS_NAMES, ACTIVE_WORDS)
    if found is None:
        return []
    column, word = found
    why = f"{column.name} is {column.type}, and {word!r} is its only value for active; any other value denies"
    value: dict[str, Any] = {"column": column.name, "equals": word}
    deleted = deleted_column(candidate.table)
    if deleted is not None:
        value = {"expression": f"{_of_row(column.name)} = {quote_literal(word)} AND {_of_row(deleted)} IS NULL"}
        why += f", and so does a {deleted}"
    return [StandIn(field="is_active", instead_of="is_active", value=value, why=why)]


def _of_row(name: str) -> str:
    """Return a column's name for an expression of the mapping."""
    return "{row}." + (name if _PLAIN.fullmatch(name) else quote_identifier(name))


def deleted_column(table: HostTable) -> str | None:
    """Return the column with the time when a row was deleted, if the host keeps deleted rows."""
    names = (column.name for column in table.columns.values() if column.kind == "time")
    return next((name for name in names if plain(name) in DELETED_NAMES), None)


def _counts(candidate: Candidate, sampler: Sampler) -> list[StandIn]:
    """Return the condition for a log row that counts, if one status value means success."""
    status = _status_column(candidate, sampler, CALL_STATUS_NAMES, OK_WORDS)
    if status is None:
        return []
    column, word = status
    failed = sampler.word(candidate.table, column.name, FAILED_WORDS)
    value = {"column": column.name, "equals": word} | ({} if failed is None else {"failed": failed})
    why = f"{column.name} is {column.type}, and {word!r} is its only value for success"
    return [StandIn(field="counts", instead_of="success", value=value, why=why)]


def _status_column(
    candidate: Candidate, sampler: Sampler, names: Collection[str], words: Sequence[str]
) -> tuple[HostColumn, str] | None:
    """Return the column with one of these names that has one of these words as a value, and the word; None: not one."""
    taken = {match.column.name for match in candidate.matches.found.values()}
    found = []
    for column in candidate.table.columns.values():
        if column.kind == "text" and column.name not in taken and plain(column.name) in names:
            word = sampler.word(candidate.table, column.name, words)
            found += [(column, word)] if word is not None else []
    return found[0] if len(found) == 1 else None


def included_column(candidate: Candidate) -> tuple[str, float, str] | None:
    """Return the column of a subscription with the tokens that it includes, a score from 0 to 1, and why."""
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
