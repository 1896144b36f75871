"""Match a table's columns with the fields of the mapping, by name, type and keys, then by elimination. Pure."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trueup.discovery.catalog import HostColumn, HostTable
from trueup.host.fields import FIELDS, TABLES, FieldEntry, Noun

Certainty = Literal["certain", "likely", "guess"]

SOUGHT_FIELDS = {
    noun: {name: entry for name, entry in fields.items() if entry.is_sought} for noun, fields in FIELDS.items()
}
"""The columns that discovery looks for by name, by table."""

CERTAIN, LIKELY = 0.95, 0.7
# The only column left of a required type is worth a guess.
_LAST_ONE = 0.45
_REFERENCE = 0.99
_PLANS = ("token_plan_id", "full_plan_id")

_USED = (
    "tokens_used used_tokens tokens_consumed consumed_tokens tokens_spent spent_tokens credits_used used_credits "
    "credits_spent quota_used used_quota usage used spend spent consumed"
)
USED_NAMES = frozenset(_USED.split())
"""The names of a counter that counts up."""

_HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_FUZZY = 0.86

Known = Mapping[Noun, frozenset[int]]
"""The oids of the tables that may be each noun's, as far as known."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """A column for a field. `score`: from 0 to 1, how certain the match is."""

    column: HostColumn
    score: float
    why: str


@dataclass(kw_only=True)
class Matches:
    """The matches in a table by field, and the columns with a fitting name and a wrong type."""

    found: dict[str, Match] = field(default_factory=dict)
    wrong_type: dict[str, HostColumn] = field(default_factory=dict)

    def mean(self, fields: tuple[str, ...]) -> float:
        """Return the mean score of these fields."""
        return sum(self.found[name].score for name in fields if name in self.found) / len(fields)


def certainty_of(score: float) -> Certainty:
    return "certain" if score >= CERTAIN else "likely" if score >= LIKELY else "guess"


def default_name(noun: Noun, field_name: str) -> str:
    """Return Django's default name of a field, or of a noun's table for "table"."""
    table = TABLES[noun]
    return table.entry.default_name if field_name == "table" else str(table.model_fields[field_name].default)


def match_columns(noun: Noun, table: HostTable, known: Known) -> Matches:
    """Return the columns of a table for a noun's fields. Each column is used once, the best match first."""
    matches = Matches()
    scored: list[tuple[float, int, str, Match]] = []
    for place, (name, wanted) in enumerate(SOUGHT_FIELDS[noun].items()):
        for column in table.columns.values():
            score, why = _score(noun, name, column, table, known)
            if not score:
                continue
            if column.kind not in wanted.kinds:
                if score >= 0.9:
                    matches.wrong_type.setdefault(name, column)
                continue
            scored.append((score, -place, name, Match(column=column, score=score, why=why)))
    taken: set[str] = set()
    # At equal scores the field that is listed first wins, then the first column: Python's sort is stable.
    for _, _, name, match in sorted(scored, key=lambda one: (one[0], one[1]), reverse=True):
        if name not in matches.found and match.column.name not in taken:
            matches.found[name] = match
            taken.add(match.column.name)
    _share_plan_column(matches, table, known)
    if noun == "subscription":
        _take_used_counter(table, matches, taken)
    _take_last_ones(noun, table, matches, taken)
    return matches


def _score(noun: Noun, name: str, column: HostColumn, table: HostTable, known: Known) -> tuple[float, str]:
    """Return how well a column fits a field, without regard to its type, and why."""
    entry = SOUGHT_FIELDS[noun][name]
    referenced = entry.references
    score, why = nearness(column.name, default_name(noun, name), entry.names)
    if name == "id":
        if column.name not in table.primary_key:
            return min(score, 0.6), why
        # A partitioned table's key contains the partition column too.
        return (1.0, "the primary key") if len(table.primary_key) == 1 else (max(score, 0.8), "in the primary key")
    if table.primary_key == (column.name,) and referenced is None:
        return 0.0, ""
    target = table.references.get(column.name)
    if referenced is None:
        return (0.0, "") if target is not None else (score, why)
    wanted = known.get(referenced, frozenset())
    if target is None:
        return min(score, 0.94) if wanted and score < 1 else score, why
    if target in wanted:
        # Of several such foreign keys, the one with the better name scores higher.
        return max(score, _REFERENCE - 0.06 * (1 - max(score, 0.5))), f"a foreign key to {name.removesuffix('_id')}s"
    return (0.0, "") if wanted else (score, why)


def _share_plan_column(matches: Matches, table: HostTable, known: Known) -> None:
    """Use one column for both kinds of plans if the host has one kind: both nouns are the same table then."""
    one, other = (matches.found.get(name) for name in _PLANS)
    if (one is None) == (other is None):
        return
    single = one or other
    assert single is not None  # noqa: S101 - for the type checker: one of both is there
    missing = _PLANS[0] if one is None else _PLANS[1]
    referenced = SOUGHT_FIELDS["subscription"][missing].references
    wanted = known.get(referenced, frozenset()) if referenced else frozenset()
    target = table.references.get(single.column.name)
    if wanted and target is not None and target not in wanted:
        return
    why = "the host has one kind of plan: the same column as for the other kind"
    matches.found[missing] = Match(column=single.column, score=min(single.score, 0.8), why=why)


def _take_used_counter(table: HostTable, matches: Matches, taken: set[str]) -> None:
    """Take a column of used tokens as the counter, unless a column is clearly named like the tokens left."""
    found = matches.found.get("tokens_remaining")
    if found is not None and found.score >= LIKELY:
        return
    wanted = SOUGHT_FIELDS["subscription"]["tokens_remaining"]
    for column in table.columns.values():
        if plain(column.name) in USED_NAMES and _is_free(column, wanted, table, taken - {found and found.column.name}):
            if found is not None:
                taken.discard(found.column.name)
            taken.add(column.name)
            why = "its name says that it counts used tokens"
            matches.found["tokens_remaining"] = Match(column=column, score=0.85, why=why)
            return


def _take_last_ones(noun: Noun, table: HostTable, matches: Matches, taken: set[str]) -> None:
    """Give a required field the only remaining column of its type."""
    for name, wanted in SOUGHT_FIELDS[noun].items():
        if name in matches.found or not wanted.required or wanted.references or name in ("id", "end_date"):
            continue
        # If both parts of the total are found, a number with an unknown name is not the total.
        if name == "total_tokens" and {"prompt_tokens", "completion_tokens"} <= matches.found.keys():
            continue
        left = [column for column in table.columns.values() if _is_free(column, wanted, table, taken)]
        if len(left) == 1:
            why = f"the only column of type {left[0].type} that is left"
            matches.found[name] = Match(column=left[0], score=_LAST_ONE, why=why)
            taken.add(left[0].name)


def _is_free(column: HostColumn, wanted: FieldEntry, table: HostTable, taken: set[str]) -> bool:
    return (
        column.kind in wanted.kinds
        and column.name not in taken
        and column.name not in table.references
        and table.primary_key != (column.name,)
    )


def plain(name: str) -> str:
    """Return a name in lower case with its words joined by "_": tokensLeft becomes tokens_left."""
    return re.sub(r"\W+", "_", _HUMPS.sub("_", name)).strip("_").lower()


def nearness(name: str, default: str, others: tuple[str, ...]) -> tuple[float, str]:
    """Return how well a name fits a field, from 0 to 1, and why. 1: it is Django's default name."""
    if name == default:
        return 1.0, "Django's default name"
    mine, known = plain(name), (plain(default), *others)
    if mine == known[0] or mine.replace("_", "") == known[0].replace("_", ""):
        return 0.95, f"{default} in another spelling"
    # Names further back in the list are weaker evidence.
    for place, other in enumerate(others):
        if mine == other or mine.replace("_", "") == other.replace("_", ""):
            return max(0.9 - 0.015 * place, 0.6), f"another name for {default}"
    # Django prefixes a model's name with the application's label and joins its words: assistant_aiusage.
    words = mine.split("_")
    tails = {"".join(words[place:]) for place in range(1, len(words))}
    ends = [other for other in known if len(other) > 3 and other.replace("_", "") in tails]
    if ends:
        return 0.75, f"its name ends with {max(ends, key=len)}"
    holds = [other for other in known if len(other) > 3 and f"_{other}_" in f"_{mine}_"]
    if holds:
        return 0.6, f"its name contains {max(holds, key=len)}"
    close = difflib.get_close_matches(mine, known, n=1, cutoff=_FUZZY)
    return (0.55, f"its name is close to {close[0]}") if close else (0.0, "")
