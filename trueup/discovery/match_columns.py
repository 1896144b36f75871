"""Which column of a table is what trueup looks for: by name, type, keys, and what is left over. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trueup.discovery.catalog import HostColumn, HostTable
from trueup.discovery.vocabulary import SOUGHT_FIELDS, nearness
from trueup.host.fields import TABLES, FieldEntry, Noun

Certainty = Literal["certain", "likely", "guess"]

CERTAIN, LIKELY = 0.95, 0.7
# What may be the last of its kind in a table is worth a guess.
_LAST_ONE = 0.45
_REFERENCE = 0.99
_PLANS = ("token_plan_id", "full_plan_id")

Known = Mapping[Noun, frozenset[int]]
"""The tables (oids) that a noun may be, as far as that is known."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """A column for a field. `score`: 0 to 1, how sure that is."""

    column: HostColumn
    score: float
    why: str


@dataclass(kw_only=True)
class Matches:
    """What was found in a table, by field; and columns of the right name whose type does not do."""

    found: dict[str, Match] = field(default_factory=dict)
    wrong_type: dict[str, HostColumn] = field(default_factory=dict)

    def mean(self, fields: tuple[str, ...]) -> float:
        """Return the mean score of these fields."""
        return sum(self.found[name].score for name in fields if name in self.found) / len(fields)


def certainty_of(score: float) -> Certainty:
    return "certain" if score >= CERTAIN else "likely" if score >= LIKELY else "guess"


def default_name(noun: Noun, field_name: str) -> str:
    """Return Django's default name of a field, or of a noun's `table`."""
    table = TABLES[noun]
    return table.entry.default_name if field_name == "table" else str(table.model_fields[field_name].default)


def match_columns(noun: Noun, table: HostTable, known: Known) -> Matches:
    """Return the columns of a table for a noun's fields, each used once, the surest first."""
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
    # At one score the field that was listed first: Python's sort keeps the order of columns.
    for _, _, name, match in sorted(scored, key=lambda one: (one[0], one[1]), reverse=True):
        if name not in matches.found and match.column.name not in taken:
            matches.found[name] = match
            taken.add(match.column.name)
    _share_plan_column(matches, table, known)
    _take_last_ones(noun, table, matches, taken)
    return matches


def _score(noun: Noun, name: str, column: HostColumn, table: HostTable, known: Known) -> tuple[float, str]:
    """Return how well a column fits a field, but for its type."""
    entry = SOUGHT_FIELDS[noun][name]
    referenced = entry.references
    score, why = nearness(column.name, default_name(noun, name), entry.names)
    if name == "id":
        if column.name not in table.primary_key:
            return min(score, 0.6), why
        # A partitioned table's key has the partitions' column in it too.
        return (1.0, "the primary key") if len(table.primary_key) == 1 else (max(score, 0.8), "in the primary key")
    if table.primary_key == (column.name,) and referenced is None:
        return 0.0, ""
    leads_to = table.references.get(column.name)
    if referenced is None:
        return (0.0, "") if leads_to is not None else (score, why)
    wanted = known.get(referenced, frozenset())
    if leads_to is None:
        return min(score, 0.94) if wanted and score < 1 else score, why
    if leads_to in wanted:
        # Of several that lead there, the one with the better name.
        return max(score, _REFERENCE - 0.06 * (1 - max(score, 0.5))), f"a foreign key to {name.removesuffix('_id')}s"
    return (0.0, "") if wanted else (score, why)


def _share_plan_column(matches: Matches, table: HostTable, known: Known) -> None:
    """A host with one kind of plan: both nouns are the same table, by the same column."""
    one, other = (matches.found.get(name) for name in _PLANS)
    if (one is None) == (other is None):
        return
    single = one or other
    assert single is not None  # noqa: S101 - for the type checker: one of both is there
    missing = _PLANS[0] if one is None else _PLANS[1]
    referenced = SOUGHT_FIELDS["subscription"][missing].references
    wanted = known.get(referenced, frozenset()) if referenced else frozenset()
    leads_to = table.references.get(single.column.name)
    if wanted and leads_to is not None and leads_to not in wanted:
        return
    why = "the host has one kind of plan: the same column as for the other kind"
    matches.found[missing] = Match(column=single.column, score=min(single.score, 0.8), why=why)


def _take_last_ones(noun: Noun, table: HostTable, matches: Matches, taken: set[str]) -> None:
    """Give a field that nothing else works without the only column left that could be it."""
    for name, wanted in SOUGHT_FIELDS[noun].items():
        if name in matches.found or not wanted.required or wanted.references or name in ("id", "end_date"):
            continue
        # Where both parts are named, a number that is called otherwise is something else.
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
