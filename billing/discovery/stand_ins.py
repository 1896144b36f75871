"""What stands for columns and tables that a host does not have, where that can be told for sure."""

from dataclasses import dataclass
from typing import Any

from billing.discovery.samples import Sampler
from billing.discovery.tables import Candidate
from billing.discovery.words import FAILED_WORDS, FIELDS, OK_WORDS, STATUS_NAMES, Noun, nearness, plain

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
    ("subscription", "is_active"): "is_active = {value = true} if all subscriptions are",
    ("subscription", "end_date"): 'end_date = {value = "infinity"} if none ends',
}
_LEAST = 0.6


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
    return found


def _counts(candidate: Candidate, sampler: Sampler) -> list[StandIn]:
    """Return what says that a row counts, if one column says it in a word."""
    taken = {match.column.name for match in candidate.matches.found.values()}
    told = []
    for column in candidate.table.columns.values():
        if column.kind != "text" or column.name in taken or plain(column.name) not in STATUS_NAMES:
            continue
        word = sampler.word(candidate.table, column.name, OK_WORDS)
        if word is not None:
            failed = sampler.word(candidate.table, column.name, FAILED_WORDS)
            value = {"column": column.name, "equals": word} | ({} if failed is None else {"failed": failed})
            why = f"{column.name} is {column.type}, and {word!r} its only value that says so"
            told.append(StandIn(field="counts", instead_of="success", value=value, why=why))
    return told if len(told) == 1 else []


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
