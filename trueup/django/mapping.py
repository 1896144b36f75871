"""The mapping of the host's tables, from the project's models: tables, columns, types and keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from django.apps import apps
from django.db import connections, models, router

from trueup.discovery.catalog import HostColumn, HostTable
from trueup.discovery.match_columns import LIKELY, SOUGHT_FIELDS, Match, default_name, match_columns, nearness
from trueup.discovery.substitutes import PAID_WORDS
from trueup.host.fields import FIELDS, ID_TYPES, NOUNS, FieldEntry, Noun, kind_of

_REQUIRED: tuple[Noun, ...] = ("subscription", "usage_log")
_PLANS: tuple[Noun, ...] = ("token_plan", "full_plan")
# Django's names of types, where PostgreSQL's differ.
_TYPES = {"varchar": "character varying", "serial": "integer", "bigserial": "bigint", "smallserial": "smallint"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fault in the project's settings, and its remedy."""

    what: str
    remedy: str


@dataclass(kw_only=True)
class Mapped:
    """The [host] section that follows from the models. `found`: the models, by noun."""

    host: dict[str, Any] = field(default_factory=dict)
    found: dict[Noun, type[models.Model]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def map_models(labels: Mapping[Noun, Any], fields: Mapping[str, Any]) -> Mapped:
    """Return the mapping of the models with these labels.

    `fields`: by noun in capitals, the model's field (or any value that trueup.toml may have) for a field of the
    mapping. A missing model or a doubtful field becomes a finding.
    """
    mapped = Mapped()
    _find_models(labels, mapped)
    tables = {noun: _table_of(model, mapped) for noun, model in mapped.found.items()}
    known = {noun: frozenset({table.oid}) for noun, table in tables.items()}
    for noun, table in tables.items():
        given = fields.get(noun.upper()) or {}
        matches = match_columns(noun, table, known).found
        mapped.host[noun] = {"table": table.setting, **_columns(noun, mapped, matches, given)}
        _ask_which_key(noun, table, matches, given, mapped)
    for noun in (*_PLANS, "user"):
        if noun not in labels or labels[noun] is None:
            mapped.host[noun] = False
    _add_types(tables, mapped)
    _add_paid_word(mapped)
    return mapped


def _find_models(labels: Mapping[Noun, Any], mapped: Mapped) -> None:
    for noun in NOUNS:
        label = labels.get(noun)
        if label is None:
            if noun in _REQUIRED:
                what = f"TRUEUP[{noun.upper()!r}] is missing."
                mapped.findings.append(Finding(what=what, remedy='Set it to the model\'s label, such as "app.Model".'))
            continue
        try:
            model = apps.get_model(str(label))._meta.concrete_model
        except (LookupError, ValueError):
            what = f"TRUEUP[{noun.upper()!r}] is {label!r}, which is no model of the project."
            remedy = 'Set it to the label of a model in INSTALLED_APPS, such as "app.Model".'
            mapped.findings.append(Finding(what=what, remedy=remedy))
            continue
        if model._meta.parents:
            parents = ", ".join(parent._meta.label for parent in model._meta.parents)
            what = f"TRUEUP[{noun.upper()!r}] is {label!r}, whose columns are in two tables."
            mapped.findings.append(Finding(what=what, remedy=f"trueup needs them in one: name its parent ({parents})."))
            continue
        mapped.found[noun] = model


def _table_of(model: type[models.Model], mapped: Mapped) -> HostTable:
    """Return a model's table as discovery reads it from a catalog. Its number is that of the model's first noun."""
    connection = connections[router.db_for_read(model)]
    numbers = {other: number for number, other in enumerate(mapped.found.values(), start=1)}
    schema, _, name = model._meta.db_table.replace('"', "").rpartition(".")
    table = HostTable(oid=numbers[model], schema=schema or "public", name=name, rows=None, usable=True, may_select=True)
    for one in model._meta.concrete_fields:
        declared = (one.db_type(connection) or "").split("(")[0].strip()
        type_name = _TYPES.get(declared, declared)
        table.columns[one.column] = HostColumn(
            name=one.column, type=type_name, kind=kind_of(type_name), required=not one.null and not one.has_default()
        )
        if one.primary_key:
            table.primary_key = (one.column,)
        target = one.remote_field.model._meta.concrete_model if one.remote_field else None
        if target is not None:
            table.references[one.column] = numbers.get(target, -1)
    return table


def _columns(noun: Noun, mapped: Mapped, matches: Mapping[str, Match], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a noun's columns. `given`: the project's own words for some of them."""
    model, settings = mapped.found[noun], dict[str, Any]()
    key = noun.upper()
    for name in given:
        if name not in FIELDS[noun] and name != "completed_status":
            remedy = f"Its fields are {', '.join(FIELDS[noun])}."
            mapped.findings.append(Finding(what=f"TRUEUP['FIELDS'][{key!r}][{name!r}] is unknown.", remedy=remedy))
    for name, entry in FIELDS[noun].items():
        match = matches.get(name)
        if name in given:
            settings[name] = _column_of(model, given[name])
        elif match is not None and match.score >= LIKELY:
            settings[name] = match.column.name
        elif name in SOUGHT_FIELDS[noun] and not _is_spared(name, mapped):
            settings |= _instead(noun, name, entry, match, mapped)
    return settings


def _column_of(model: type[models.Model], value: Any) -> Any:
    """Return the column of a field that is named as in the model. Anything else is a value of the mapping's own."""
    columns = {one.name: one.column for one in model._meta.concrete_fields}
    return columns.get(value, value) if isinstance(value, str) else value


def _ask_which_key(
    noun: Noun, table: HostTable, matches: Mapping[str, Match], given: Mapping[str, Any], mapped: Mapped
) -> None:
    """Add a finding where several foreign keys lead to the same model, and their names do not tell them apart."""
    for name, match in matches.items():
        target = table.references.get(match.column.name)
        if target is None or name in given:
            continue
        rivals = [column for column, other in table.references.items() if other == target]
        own = nearness(match.column.name, default_name(noun, name), FIELDS[noun][name].names)[0]
        equal = [one for one in rivals if nearness(one, default_name(noun, name), FIELDS[noun][name].names)[0] == own]
        if len(equal) > 1:
            what = f"{mapped.found[noun]._meta.label} has several keys for {name}: {', '.join(sorted(equal))}."
            remedy = f'Set TRUEUP["FIELDS"]["{noun.upper()}"]["{name}"] to the right one.'
            mapped.findings.append(Finding(what=what, remedy=remedy))


def _is_spared(name: str, mapped: Mapped) -> bool:
    """Return whether a host without such plans has no column either."""
    return name in ("token_plan_id", "full_plan_id") and name.removesuffix("_id") not in mapped.found


def _instead(noun: Noun, name: str, entry: FieldEntry, match: Match | None, mapped: Mapped) -> dict[str, Any]:
    """Return the substitute for a field that no column fits for certain. A required one is a finding instead."""
    if entry.substitute is not None:
        return {name: {"value": entry.substitute}}
    if not entry.required:
        return {}
    label, key = mapped.found[noun]._meta.label, noun.upper()
    doubt = f" {match.column.name!r} is only a guess." if match is not None else ""
    remedy = f'Set TRUEUP["FIELDS"]["{key}"]["{name}"] to the model\'s field'
    for setting, where in entry.otherwise:
        remedy += f", or to {setting!r} if {where}"
    mapped.findings.append(Finding(what=f"{label} has no field for {name}.{doubt}", remedy=f"{remedy}."))
    return {}


def _add_types(tables: Mapping[Noun, HostTable], mapped: Mapped) -> None:
    for setting, noun, name in (("user_id_type", "subscription", "user_id"), ("usage_log_id_type", "usage_log", "id")):
        column = mapped.host.get(noun, {}).get(name) if noun in tables else None
        found = tables[noun].columns.get(column) if isinstance(column, str) else None  # type: ignore[index]
        if found is not None and found.kind in ID_TYPES:
            mapped.host[setting] = ID_TYPES[found.kind]


def _add_paid_word(mapped: Mapped) -> None:
    """Find the status of a completed payment among the choices of the model's field."""
    settings = mapped.host.get("payment")
    if not settings or "completed_status" in settings:
        return
    model = mapped.found["payment"]
    statuses = [one for one in model._meta.concrete_fields if one.column == settings.get("status")]
    words = {str(value).lower(): value for one in statuses for value, _ in one.flatchoices}
    paid = [words[word] for word in PAID_WORDS if word in words]
    if paid:
        settings["completed_status"] = paid[0]
    elif words:
        what = f"{model._meta.label}: none of {', '.join(map(repr, words.values()))} says that a payment is complete."
        remedy = 'Set TRUEUP["FIELDS"]["PAYMENT"]["completed_status"].'
        mapped.findings.append(Finding(what=what, remedy=remedy))
