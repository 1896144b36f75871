"""What was not found in a host's database: why, what does not work until it is, and what to do. Pure."""

from collections.abc import Collection
from dataclasses import dataclass

from trueup.discovery.catalog import Catalog, HostTable
from trueup.discovery.match_columns import Matches, default_name
from trueup.discovery.match_tables import Candidate, log_without_total
from trueup.discovery.vocabulary import SOUGHT_FIELDS
from trueup.host.fields import TABLES, Noun


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A setting that was not found. `stops`: what does not work until it is; "": nothing."""

    setting: str
    why: str
    remedy: str
    stops: str


def missing_table(noun: Noun, catalog: Catalog) -> Gap:
    """Return that no table was found for a noun; and where one column more would make it one, that."""
    setting = f"host.{noun}.table"
    near = log_without_total(catalog) if noun == "usage_log" else None
    if near is not None:
        return _missing_total(*near)
    example = f'table = "SCHEMA.TABLE" under [host.{noun}]'
    about = TABLES[noun].entry
    if about.optional:
        why = f"no table looks like {about.meaning}"
        return Gap(setting=setting, why=why, remedy=f"if there is one, set {example}: causes become certain", stops="")
    why = f"no table has the columns of {about.meaning}"
    return Gap(setting=setting, why=why, remedy=f"set {example}, and its columns", stops="everything")


def _missing_total(table: HostTable, matches: Matches) -> Gap:
    prompt, completion = (matches.found[name].column.name for name in ("prompt_tokens", "completion_tokens"))
    column = matches.wrong_type.get("total_tokens")
    if column is None:
        why = f"has no column with {prompt} and {completion} together"
        remedy = "add such a column (integer), and a trigger BEFORE INSERT OR UPDATE that fills it; not GENERATED, for "
        remedy += "trueup's rows give it"
    else:
        why = f"its {column.name} is of type {column.type}, which is not integer"
        remedy = "make it integer or bigint, or add such a column"
    return Gap(
        setting="host.usage_log.total_tokens",
        why=f"{table.setting} looks like the AI usage log, but {why}",
        remedy=remedy,
        stops="everything",
    )


def left_out(noun: Noun, table: HostTable, names: str) -> Gap:
    """Return that an optional table is there, without some of its columns."""
    return Gap(
        setting=f"host.{noun}.table",
        why=f"{table.setting} looks like {TABLES[noun].entry.meaning}, but no column was found for {names}",
        remedy=f'set table = "{table.setting}" under [host.{noun}] and these columns, or do without it',
        stops="",
    )


def missing_columns(noun: Noun, candidate: Candidate, spared: Collection[str]) -> list[Gap]:
    """Return the columns that were not found. `spared`: fields that need none."""
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
        if wanted.otherwise:
            remedy += f", or set {wanted.otherwise}"
        gaps.append(Gap(setting=f"host.{noun}.{name}", why=why, remedy=remedy, stops=stops))
    return gaps
