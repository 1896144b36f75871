"""Propose a [host] mapping from a database's catalog: each choice with its certainty and reason, and all gaps."""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection

from trueup.discovery.catalog import Catalog, HostTable
from trueup.discovery.match_columns import (
    LIKELY,
    SOUGHT_FIELDS,
    USED_NAMES,
    Certainty,
    Match,
    Matches,
    certainty_of,
    default_name,
    plain,
)
from trueup.discovery.match_tables import Candidate, choose_tables, log_without_total
from trueup.discovery.remarks import remarks_on
from trueup.discovery.samples import Sampler
from trueup.discovery.substitutes import PAID_WORDS, included_column, stand_ins
from trueup.discovery.toml import toml_value
from trueup.host.fields import FIELDS, ID_TYPES, NOUNS, TABLES, Noun, settings_of
from trueup.host.mapping import HostMapping
from trueup.host.questions import Question, open_questions

SCHEMA_VERSION = 1

_PLANS: tuple[Noun, Noun] = ("token_plan", "full_plan")
# A wrong guess would change counters or budgets to wrong values.
_NEVER_GUESSED: tuple[tuple[Noun, str], ...] = (
    ("subscription", "tokens_remaining"),
    ("token_plan", "tokens_included"),
    ("full_plan", "tokens_included"),
)


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A setting without a match in the database. `stops`: what does not work without it; "": everything works."""

    setting: str
    why: str
    remedy: str
    stops: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A proposed setting. `value`: a name in the host's database, or a type."""

    setting: str
    value: str
    certainty: Certainty
    why: str


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The proposed mapping. `mapping` None: a required table or column was not found; see `gaps`.

    `notes`: further obstacles in these tables, each with its remedy.
    """

    mapping: HostMapping | None
    choices: list[Choice]
    gaps: list[Gap]
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The [host] section: only settings that differ from Django's default names."""
        return {} if self.mapping is None else _as_written(self.mapping)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "complete": self.mapping is not None,
            "host": self.settings,
            "choices": [asdict(choice) for choice in self.choices],
            "gaps": [asdict(gap) for gap in self.gaps],
            "notes": self.notes,
        }


def propose(connection: Connection, catalog: Catalog, given: Mapping[str, Any] | None = None) -> Proposal:
    """Return the mapping that fits these tables best. Reads a few rows if the role may; writes nothing.

    `given`: the [host] that a person has set. It is used only for settings without a match.
    """
    given = given or {}
    chosen = choose_tables(catalog)
    sampler = Sampler(connection=connection)
    drafts: dict[Noun, dict[str, Any]] = {}
    choices: list[Choice] = []
    gaps: list[Gap] = []
    without = _without(chosen, choices)
    gaps += _guessed(chosen, without, given)
    for noun in NOUNS:
        candidate = chosen.get(noun)
        by_person = given.get(noun) or {}
        if candidate is None and noun in without:
            continue
        if candidate is None:
            if "table" in by_person:
                drafts[noun] = dict(by_person)
                choices += _choices_by_person(noun, by_person)
            else:
                gaps.append(_missing_table(noun, catalog))
            continue
        instead = stand_ins(noun, candidate, sampler)
        # A host without plans has no foreign keys to them.
        spared = {one.instead_of for one in instead} | {f"{plan}_id" for plan in _PLANS if plan in without}
        lacking = _missing_columns(noun, candidate, spared)
        found_otherwise = {one.field for one in instead} | set(without.get(noun) or ())
        used = _used_for(lacking, by_person) | _not_sought(noun, by_person, found_otherwise)
        lacking = [gap for gap in lacking if not _used_for([gap], by_person)]
        if TABLES[noun].entry.optional:
            needed = [gap.setting for gap in lacking if gap.stops]
            if noun == "payment" and "full_plan" not in without and "duration_days" not in drafts.get("full_plan", {}):
                needed.append("host.full_plan.duration_days")
            if needed:
                gaps.append(_left_out(noun, candidate.table, ", ".join(needed)))
                continue
        choices += _choices_of(noun, candidate)
        choices += [
            Choice(setting=f"host.{noun}.{one.field}", value=toml_value(one.value), certainty="likely", why=one.why)
            for one in instead
        ]
        choices += _choices_by_person(noun, used)
        gaps += lacking
        names = {name: match.column.name for name, match in candidate.matches.found.items()}
        names |= _way_of_counter(noun, names, by_person) | _section_type(noun, candidate)
        drafts[noun] = {"table": candidate.table.setting, **names, **{one.field: one.value for one in instead}, **used}
    types = {name: given[name] for name in ("user_id_type", "usage_log_id_type", "time_zone") if name in given}
    types |= _types(drafts, chosen, choices)
    if "subscription" in drafts:
        drafts["subscription"] |= without.pop("subscription", {})
    notes = _paid_word(chosen, drafts, sampler, choices)
    stopped = [gap for gap in gaps if gap.stops == "everything"]
    mapping = None if stopped else HostMapping.model_validate({**types, **without, **drafts})
    if mapping is not None:
        said = "counts" in (given.get("subscription") or {})
        asked = [_asked(question) for question in open_questions(connection, mapping, is_way_said=said)]
        gaps += asked
        mapping = None if asked else mapping
    counts = drafts.get("usage_log", {}).get("counts") or {}
    found = {noun: chosen[noun] for noun in drafts if noun in chosen}
    notes += remarks_on(catalog, found, sampler, filled=counts.get("column"))
    return Proposal(mapping=mapping, choices=choices, gaps=gaps, notes=notes)


def _without(chosen: dict[Noun, Candidate], choices: list[Choice]) -> dict[str, Any]:
    """Return the settings for a host without tables of users or plans, if its subscriptions do not need them."""
    settings: dict[str, Any] = {}
    if "subscription" not in chosen:
        return settings
    if "user" not in chosen:
        settings["user"] = False
        why = "no table has the columns of users, so the views show no names"
        choices.append(Choice(setting="host.user", value="false", certainty="likely", why=why))
    included = included_column(chosen["subscription"])
    if "token_plan" in chosen or "full_plan" in chosen or included is None:
        return settings
    name, score, why = included
    for noun in _PLANS:
        settings[noun] = False
        holds = f"{name} holds the included tokens"
        choices.append(Choice(setting=f"host.{noun}", value="false", certainty="likely", why=holds))
    setting = "host.subscription.tokens_included"
    choices.append(Choice(setting=setting, value=name, certainty=certainty_of(score), why=why))
    return settings | {"subscription": {"tokens_included": name}}


def _guessed(chosen: dict[Noun, Candidate], without: dict[str, Any], given: Mapping[str, Any]) -> list[Gap]:
    """Return a gap for each counter or number of included tokens that is a guess and that no person has set.

    What a person has set is taken in place of a guess, and a counter whose direction a person has set, in place of any
    match.
    """
    gaps = []
    for noun, name in _NEVER_GUESSED:
        candidate = chosen.get(noun)
        if candidate is None:
            continue
        settings, found = given.get(noun) or {}, candidate.matches.found.get(name)
        by_person = settings.get(name)
        is_open = found is None or found.score < LIKELY or (name == "tokens_remaining" and "counts" in settings)
        if by_person in candidate.table.columns and is_open:
            column = candidate.table.columns[str(by_person)]
            candidate.matches.found[name] = Match(column=column, score=1.0, why="set by you under [host]")
        elif found is not None and found.score < LIKELY:
            gaps.append(_guess(noun, name, candidate.table, found.column.name, found.why))
    included = without.get("subscription", {}).get("tokens_included")
    if included is not None:
        _, score, why = included_column(chosen["subscription"]) or ("", 0.0, "")
        by_person = (given.get("subscription") or {}).get("tokens_included")
        if by_person is not None:
            without["subscription"]["tokens_included"] = by_person
        elif score < LIKELY:
            gaps.append(_guess("subscription", "tokens_included", chosen["subscription"].table, included, why))
    return gaps


def _guess(noun: Noun, name: str, table: HostTable, column: str, why: str) -> Gap:
    what = "shows a user's tokens" if name == "tokens_remaining" else "states the included tokens"
    remedy = f'set {name} = "{column}" under [host.{noun}] if it does, or name the right column'
    if name == "tokens_remaining":
        remedy += f'; if it counts used tokens, set counter = {{column = "{column}", counts = "up"}}'
    why = f"{table.setting}.{column} may be the column that {what} ({why}), but trueup does not guess this"
    return Gap(setting=f"host.{noun}.{name}", why=why, remedy=remedy, stops="everything")


def _asked(question: Question) -> Gap:
    return Gap(setting=question.setting, why=question.what, remedy=question.remedy, stops="everything")


def _way_of_counter(noun: Noun, names: Mapping[str, str], by_person: Mapping[str, Any]) -> dict[str, str]:
    """Return whether the counter counts up or down, if a person or its name says so."""
    column = names.get("tokens_remaining") if noun == "subscription" else None
    if column is None:
        return {}
    if by_person.get("tokens_remaining") == column and by_person.get("counts"):
        return {"counts": by_person["counts"]}
    return {"counts": "up"} if plain(column) in USED_NAMES else {}


def _section_type(noun: Noun, candidate: Candidate) -> dict[str, str]:
    """Return the enum of the log's section, if it is one and its name needs no quotes."""
    match = candidate.matches.found.get("section") if noun == "usage_log" else None
    if match is None or not match.column.labels or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)?", match.column.type):
        return {}
    return {"section_type": match.column.type}


def _used_for(lacking: list[Gap], by_person: Mapping[str, Any]) -> dict[str, Any]:
    """Return a person's settings for columns that were not found, by field."""
    fields = [gap.setting.rpartition(".")[2] for gap in lacking]
    fields += ["counts"] if "success" in fields else []
    return {name: by_person[name] for name in fields if name in by_person}


def _not_sought(noun: Noun, by_person: Mapping[str, Any], found: Collection[str]) -> dict[str, Any]:
    """Return a person's settings for fields that discovery does not look for by name, except those in `found`."""
    fields = FIELDS[noun].keys() - SOUGHT_FIELDS[noun].keys() - set(found)
    # Settings that are no columns. The counter's direction belongs to its column: `_way_of_counter`.
    fields |= settings_of(noun) - {"completed_status", "counts"}
    return {name: value for name, value in by_person.items() if name in fields and value is not None}


def _choices_by_person(noun: Noun, by_person: Mapping[str, Any]) -> list[Choice]:
    why = "set by you under [host]"
    if "table" in by_person and by_person["table"] is None:
        return [Choice(setting=f"host.{noun}", value="false", certainty="certain", why=why)]
    values = {name: value if isinstance(value, str) else toml_value(value) for name, value in by_person.items()}
    return [
        Choice(setting=f"host.{noun}.{name}", value=value, certainty="certain", why=why)
        for name, value in values.items()
    ]


def _as_written(mapping: HostMapping) -> dict[str, Any]:
    """Return the settings that differ from the defaults, as a person would write them."""
    settings = mapping.model_dump(exclude_defaults=True, exclude_none=True)
    settings |= {noun: False for noun in ("user", *_PLANS) if getattr(mapping, noun).table is None}
    counts = settings.get("subscription", {}).pop("counts", None)
    if counts is not None:
        column = settings["subscription"].pop("tokens_remaining", mapping.subscription.tokens_remaining)
        settings["subscription"]["counter"] = {"column": column, "counts": counts}
    log = settings.get("usage_log", {})
    if "counts" in log:
        log.pop("success", None)  # `counts` replaces it
    if "value" in log.get("metadata", ()):
        log["metadata"] = {"value": {}}
    return settings


def _choices_of(noun: Noun, candidate: Candidate) -> list[Choice]:
    table = candidate.table
    certainty = certainty_of(candidate.score)
    why = list(candidate.why)
    if table.rows is not None:
        why.append(f"about {table.rows:,} rows")
    if candidate.rival is not None:
        certainty = "guess"
        why.append(f"{candidate.rival.setting} would fit nearly as well")
    found = [Choice(setting=f"host.{noun}.table", value=table.setting, certainty=certainty, why="; ".join(why))]
    for name in SOUGHT_FIELDS[noun]:
        match = candidate.matches.found.get(name)
        if match is not None:
            setting, reason = f"host.{noun}.{name}", f"{match.why}, {match.column.type}"
            found.append(
                Choice(setting=setting, value=match.column.name, certainty=certainty_of(match.score), why=reason)
            )
    return found


_ID_COLUMNS: dict[str, tuple[Noun, str]] = {
    "user_id_type": ("subscription", "user_id"),
    "usage_log_id_type": ("usage_log", "id"),
}


def _types(drafts: dict[Noun, dict[str, Any]], chosen: dict[Noun, Candidate], choices: list[Choice]) -> dict[str, str]:
    """Return the types of ids by their columns, and add a choice for each."""
    types: dict[str, str] = {}
    for setting, (noun, field_name) in _ID_COLUMNS.items():
        match = chosen[noun].matches.found.get(field_name) if noun in drafts and noun in chosen else None
        if match is not None:
            types[setting] = ID_TYPES[match.column.kind]
            why = f"{chosen[noun].table.setting}.{match.column.name} is {match.column.type}"
            choices.append(Choice(setting=f"host.{setting}", value=types[setting], certainty="certain", why=why))
    return types


def _paid_word(
    chosen: dict[Noun, Candidate], drafts: dict[Noun, dict[str, Any]], sampler: Sampler, choices: list[Choice]
) -> list[str]:
    """Find the status of a completed payment. Returns a note if it is not clear."""
    if "payment" not in drafts or "payment" not in chosen or "completed_status" in drafts["payment"]:
        return []
    table, status = chosen["payment"].table, drafts["payment"]["status"]
    word = sampler.word(table, status, PAID_WORDS)
    if word is None:
        note = (
            f"{table.setting}.{status}: trueup could not tell which value marks a completed payment. Set "
            'completed_status under [host.payment]; the default is "completed".'
        )
        return [note]
    drafts["payment"]["completed_status"] = word
    why = "an enum's value" if table.columns[status].labels else f"a value of {status} in a sample"
    choices.append(Choice(setting="host.payment.completed_status", value=word, certainty="likely", why=why))
    return []


def _missing_table(noun: Noun, catalog: Catalog) -> Gap:
    """Return the gap for a table that was not found, or for the one column that a near match lacks."""
    setting = f"host.{noun}.table"
    near = log_without_total(catalog) if noun == "usage_log" else None
    if near is not None:
        return _missing_total(*near)
    example = f'table = "SCHEMA.TABLE" under [host.{noun}]'
    about = TABLES[noun].entry
    if about.optional:
        why = f"no table looks like {about.meaning}"
        remedy = f"if there is one, set {example}: causes of drift become certain"
        return Gap(setting=setting, why=why, remedy=remedy, stops="")
    why = f"no table has the columns of {about.meaning}"
    return Gap(setting=setting, why=why, remedy=f"set {example}, and its columns", stops="everything")


def _missing_total(table: HostTable, matches: Matches) -> Gap:
    prompt, completion = (matches.found[name].column.name for name in ("prompt_tokens", "completion_tokens"))
    column = matches.wrong_type.get("total_tokens")
    if column is None:
        why = f"has no column with the sum of {prompt} and {completion}"
        remedy = "add such a column (integer), and a trigger BEFORE INSERT OR UPDATE that fills it; it can't be "
        remedy += "GENERATED, because trueup's rows set it"
    else:
        why = f"its {column.name} is of type {column.type}, which is not integer"
        remedy = "make it integer or bigint, or add such a column"
    return Gap(
        setting="host.usage_log.total_tokens",
        why=f"{table.setting} looks like the AI usage log, but {why}",
        remedy=remedy,
        stops="everything",
    )


def _left_out(noun: Noun, table: HostTable, names: str) -> Gap:
    """Return the gap for an optional table that lacks the columns `names`."""
    return Gap(
        setting=f"host.{noun}.table",
        why=f"{table.setting} looks like {TABLES[noun].entry.meaning}, but no column was found for {names}",
        remedy=f'set table = "{table.setting}" and these columns under [host.{noun}], or leave it unmapped',
        stops="",
    )


def _missing_columns(noun: Noun, candidate: Candidate, spared: Collection[str]) -> list[Gap]:
    """Return a gap for each column that was not found. `spared`: fields that need no column."""
    gaps = []
    for name, wanted in SOUGHT_FIELDS[noun].items():
        if name in candidate.matches.found or name in spared:
            continue
        column = candidate.matches.wrong_type.get(name)
        kinds = " or ".join(sorted(wanted.kinds))
        why = f"{candidate.table.setting} has no column like {default_name(noun, name)}"
        if column is not None:
            why = f"{candidate.table.setting}.{column.name} is of type {column.type}, which is not {kinds}"
        stops = "everything" if wanted.required else "" if wanted.use.startswith("nothing") else wanted.use
        remedy = f'set {name} = "COLUMN" under [host.{noun}], or add such a column ({kinds})'
        for setting, where in wanted.otherwise:
            remedy += f", or set {name} = {toml_value(setting)} if {where}"
        gaps.append(Gap(setting=f"host.{noun}.{name}", why=why, remedy=remedy, stops=stops))
    return gaps
