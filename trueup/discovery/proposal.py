"""A [host] mapping proposed from a database's catalog: each choice with how sure it is and why, and what is missing."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection

from trueup.discovery.catalog import Catalog
from trueup.discovery.gaps import Gap, left_out, missing_columns, missing_table
from trueup.discovery.match_columns import Certainty, certainty_of
from trueup.discovery.match_tables import Candidate, choose_tables
from trueup.discovery.remarks import remarks_on
from trueup.discovery.samples import Sampler
from trueup.discovery.substitutes import StandIn, included_column, stand_ins
from trueup.discovery.toml import toml_value
from trueup.discovery.vocabulary import PAID_WORDS, SOUGHT_FIELDS
from trueup.host.fields import ID_TYPES, NOUNS, TABLES, Noun
from trueup.host.mapping import HostMapping

SCHEMA_VERSION = 1

_PLANS: tuple[Noun, Noun] = ("token_plan", "full_plan")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A setting that was found. `value`: a name of the host's, or a type."""

    setting: str
    value: str
    certainty: Certainty
    why: str


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What is proposed. `mapping` None: a table that nothing works without was not found.

    `notes`: what else a person should know of these tables, each with its remedy.
    """

    mapping: HostMapping | None
    choices: list[Choice]
    gaps: list[Gap]
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The [host] section: only what differs from Django's default names."""
        if self.mapping is None:
            return {}
        return _as_written(self.mapping)

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
    """Return the mapping that fits these tables best. Reads a few rows where the role may; nothing is written.

    `given`: a [host] that a person has set. It is asked for what is not found, and for nothing else.
    """
    given = given or {}
    chosen = choose_tables(catalog)
    sampler = Sampler(connection=connection)
    drafts: dict[Noun, dict[str, Any]] = {}
    choices: list[Choice] = []
    gaps: list[Gap] = []
    without = _without(chosen, choices)
    for noun in NOUNS:
        candidate = chosen.get(noun)
        told = given.get(noun) or {}
        if candidate is None and noun in without:
            continue
        if candidate is None:
            if "table" in told:
                drafts[noun] = dict(told)
                choices += _choices_by_hand(noun, told)
            else:
                gaps.append(missing_table(noun, catalog))
            continue
        instead = stand_ins(noun, candidate, sampler)
        # Without such plans no key leads to them.
        spared = {one.instead_of for one in instead} | {f"{plan}_id" for plan in _PLANS if plan in without}
        lacking = missing_columns(noun, candidate, spared)
        by_hand = _by_hand(lacking, told)
        lacking = [gap for gap in lacking if not _by_hand([gap], told)]
        if TABLES[noun].entry.optional:
            names = [gap.setting for gap in lacking if gap.stops]
            if noun == "payment" and "full_plan" not in without and "duration_days" not in drafts.get("full_plan", {}):
                names.append("host.full_plan.duration_days")
            if names:
                gaps.append(left_out(noun, candidate.table, ", ".join(names)))
                continue
        choices += _choices_of(noun, candidate)
        choices += [_choice_instead(noun, one) for one in instead]
        choices += _choices_by_hand(noun, by_hand)
        gaps += lacking
        drafts[noun] = _names_of(candidate) | {one.field: one.value for one in instead} | by_hand
    types = {name: given[name] for name in ("user_id_type", "usage_log_id_type") if name in given}
    types |= _types(drafts, chosen, choices)
    if "subscription" in drafts:
        drafts["subscription"] |= without.pop("subscription", {})
    notes = _paid_word(chosen, drafts, sampler, choices)
    stopped = [gap for gap in gaps if gap.stops == "everything"]
    mapping = None if stopped else HostMapping.model_validate({**types, **without, **drafts})
    counts = drafts.get("usage_log", {}).get("counts") or {}
    found = {noun: chosen[noun] for noun in drafts if noun in chosen}
    notes += remarks_on(catalog, found, sampler, filled=counts.get("column"))
    return Proposal(mapping=mapping, choices=choices, gaps=gaps, notes=notes)


def _without(chosen: dict[Noun, Candidate], choices: list[Choice]) -> dict[str, Any]:
    """Return the settings of a host that has no users or no plans: where its subscriptions do without them."""
    settings: dict[str, Any] = {}
    if "subscription" not in chosen:
        return settings
    if "user" not in chosen:
        settings["user"] = False
        why = "no table has the columns of the users: the views then show no names"
        choices.append(Choice(setting="host.user", value="false", certainty="likely", why=why))
    included = included_column(chosen["subscription"])
    if "token_plan" in chosen or "full_plan" in chosen or included is None:
        return settings
    name, score, why = included
    for noun in _PLANS:
        settings[noun] = False
        choices.append(
            Choice(setting=f"host.{noun}", value="false", certainty="likely", why=f"{name} says what is included")
        )
    choices.append(
        Choice(setting="host.subscription.tokens_included", value=name, certainty=certainty_of(score), why=why)
    )
    return settings | {"subscription": {"tokens_included": name}}


def _choice_instead(noun: Noun, one: StandIn) -> Choice:
    return Choice(setting=f"host.{noun}.{one.field}", value=toml_value(one.value), certainty="likely", why=one.why)


def _by_hand(lacking: list[Gap], told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a person has set for columns that were not found, by field."""
    fields = [gap.setting.rpartition(".")[2] for gap in lacking]
    fields += ["counts"] if "success" in fields else []
    return {name: told[name] for name in fields if name in told}


def _choices_by_hand(noun: Noun, told: Mapping[str, Any]) -> list[Choice]:
    why = "set by you under [host]"
    if "table" in told and told["table"] is None:
        return [Choice(setting=f"host.{noun}", value="false", certainty="certain", why=why)]
    return [
        Choice(
            setting=f"host.{noun}.{name}",
            value=value if isinstance(value, str) else toml_value(value),
            certainty="certain",
            why=why,
        )
        for name, value in told.items()
    ]


def _as_written(mapping: HostMapping) -> dict[str, Any]:
    """Return what differs from the defaults, as a person would write it."""
    told = mapping.model_dump(exclude_defaults=True, exclude_none=True)
    told |= {noun: False for noun in ("user", *_PLANS) if getattr(mapping, noun).table is None}
    log = told.get("usage_log", {})
    if "counts" in log:
        log.pop("success", None)  # it is what it is anyway
    if "value" in log.get("metadata", ()):
        log["metadata"] = {"value": {}}
    return told


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
            found.append(
                Choice(
                    setting=f"host.{noun}.{name}",
                    value=match.column.name,
                    certainty=certainty_of(match.score),
                    why=f"{match.why}, {match.column.type}",
                )
            )
    return found


def _names_of(candidate: Candidate) -> dict[str, Any]:
    names = {name: match.column.name for name, match in candidate.matches.found.items()}
    return {"table": candidate.table.setting, **names}


def _types(drafts: dict[Noun, dict[str, Any]], chosen: dict[Noun, Candidate], choices: list[Choice]) -> dict[str, str]:
    """The types of ids, from the columns that hold them."""
    types: dict[str, str] = {}
    if "subscription" in drafts and "subscription" in chosen:
        column = chosen["subscription"].matches.found["user_id"].column
        types["user_id_type"] = ID_TYPES[column.kind]
        why = f"{chosen['subscription'].table.setting}.{column.name} is {column.type}"
        choices.append(Choice(setting="host.user_id_type", value=types["user_id_type"], certainty="certain", why=why))
    if "usage_log" in drafts and "usage_log" in chosen and "id" in chosen["usage_log"].matches.found:
        column = chosen["usage_log"].matches.found["id"].column
        types["usage_log_id_type"] = ID_TYPES[column.kind]
        why = f"{chosen['usage_log'].table.setting}.{column.name} is {column.type}"
        choices.append(
            Choice(setting="host.usage_log_id_type", value=types["usage_log_id_type"], certainty="certain", why=why)
        )
    return types


def _paid_word(
    chosen: dict[Noun, Candidate], drafts: dict[Noun, dict[str, Any]], sampler: Sampler, choices: list[Choice]
) -> list[str]:
    """Find what a payment is called whose money has come. Returns a note if nothing tells it."""
    if "payment" not in drafts or "payment" not in chosen or "completed_status" in drafts["payment"]:
        return []
    table, status = chosen["payment"].table, drafts["payment"]["status"]
    word = sampler.word(table, status, PAID_WORDS)
    if word is None:
        note = (
            f"{table.setting}.{status}: which value says that the money has come could not be told. Set "
            'completed_status under [host.payment]; without it, "completed" is taken.'
        )
        return [note]
    drafts["payment"]["completed_status"] = word
    why = "an enum's value" if table.columns[status].labels else f"a value of {status} in a sample"
    choices.append(Choice(setting="host.payment.completed_status", value=word, certainty="likely", why=why))
    return []
