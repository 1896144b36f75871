"""Totals of drifts: overall, by cause, by size and by action. The database counts them; for a dry run, memory does."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    Integer,
    Numeric,
    Select,
    Text,
    and_,
    case,
    cast,
    column,
    func,
    not_,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB

from trueup.reports.rows import ReportRow

SET_ASIDE = ("tolerated", "ignored", "waiting")


@dataclass(frozen=True, kw_only=True)
class CauseFigures:
    """The figures of one cause. `drifts`: number of drifts with this cause, alone or with others.

    `proven`: how many of them the journal proves. `inferred`: how many follow from the rows that are there.
    `tokens_overstated`, `tokens_understated`: the tokens of this cause only.
    """

    cause: str
    drifts: int
    proven: int
    inferred: int
    tokens_overstated: int
    tokens_understated: int

    @property
    def tokens(self) -> int:
        return self.tokens_overstated + self.tokens_understated


@dataclass(frozen=True, kw_only=True)
class SizeFigures:
    """The number of drifts of `at_least` up to, but not including, ten times as many tokens, in each direction."""

    at_least: int
    overstated: int
    understated: int


def tally_totals(connection: Connection, chosen: Select[Any]) -> dict[str, int]:
    """Return the totals of the drifts that the statement `chosen` selects, by their names in `DriftReport`."""
    d = chosen.subquery().c
    set_aside = or_(d.action.in_(SET_ASIDE), func.coalesce(d.decision, "") == "ignore")
    settled = func.coalesce(d.decision, "").in_(("accept", "grant", "ignore"))
    counted = select(
        func.count().label("drifted"),
        func.count(d.user_id.distinct()).label("counters_drifted"),
        func.count().filter(d.is_new).label("found_new"),
        func.count().filter(d.action == "corrected").label("corrected"),
        func.count().filter(and_(d.action == "review", not_(settled))).label("in_review"),
        func.count().filter(set_aside).label("set_aside"),
        func.coalesce(func.sum(func.greatest(d.drift, 0)), 0).label("tokens_overstated"),
        func.coalesce(func.sum(func.greatest(-d.drift, 0)), 0).label("tokens_understated"),
        func.coalesce(func.sum(d.tokens_explained), 0).label("tokens_explained"),
        *(
            func.coalesce(func.sum(d.tokens_explained).filter(d.certainty == certainty), 0).label(f"tokens_{certainty}")
            for certainty in ("proven", "inferred")
        ),
    )
    return {name: int(value) for name, value in connection.execute(counted).mappings().one().items()}


def tally_causes(connection: Connection, chosen: Select[Any]) -> list[CauseFigures]:
    """Return the figures of each cause, the one with the most tokens first.

    A drift without components counts as one component.
    """
    drifts = chosen.subquery()
    d = drifts.c
    components = d.evidence["components"]
    whole = func.jsonb_build_array(
        func.jsonb_build_object("cause", d.cause, "tokens", d.drift, "certainty", d.certainty, type_=JSONB), type_=JSONB
    )
    several = and_(func.jsonb_typeof(components) == "array", components != cast([], JSONB))
    each = func.jsonb_array_elements(case((several, components), else_=whole))
    elements = each.table_valued(column("part", JSONB), name="elements").render_derived()
    part = elements.c.part
    parts = (
        select(
            d.id,
            part["cause"].astext.label("cause"),
            part["certainty"].astext.label("certainty"),
            cast(part["tokens"].astext, Numeric).label("tokens"),
        )
        .select_from(drifts.join(elements, true()))
        .subquery()
    )
    size = func.sum(func.abs(parts.c.tokens))
    query = (
        select(
            parts.c.cause,
            func.count(parts.c.id.distinct()).label("drifts"),
            func.count(parts.c.id.distinct()).filter(parts.c.certainty == "proven").label("proven"),
            func.count(parts.c.id.distinct()).filter(parts.c.certainty == "inferred").label("inferred"),
            cast(func.sum(func.greatest(parts.c.tokens, 0)), BigInteger).label("tokens_overstated"),
            cast(func.sum(func.greatest(-parts.c.tokens, 0)), BigInteger).label("tokens_understated"),
        )
        .group_by(parts.c.cause)
        .order_by(size.desc(), parts.c.cause)
    )
    return [CauseFigures(**row) for row in connection.execute(query).mappings()]


def tally_sizes(connection: Connection, chosen: Select[Any]) -> list[SizeFigures]:
    """Return the number of drifts for each order of magnitude, the smallest first, including empty ones in between."""
    d = chosen.subquery().c
    # The number of digits is exact; a logarithm would round.
    digits = func.length(cast(func.abs(d.drift), Text)).cast(Integer)
    query = select(
        digits.label("digits"),
        func.count().filter(d.drift > 0).label("overstated"),
        func.count().filter(d.drift <= 0).label("understated"),
    ).group_by(digits)
    return _sizes({row.digits: (row.overstated, row.understated) for row in connection.execute(query)})


def tally_actions(connection: Connection, chosen: Select[Any]) -> dict[str, int]:
    """Return the number of drifts for each action, the most frequent first."""
    d = chosen.subquery().c
    query = select(d.action, func.count()).group_by(d.action).order_by(func.count().desc(), d.action)
    return {row.action: row[1] for row in connection.execute(query)}


def tally_findings(rows: Iterable[ReportRow]) -> tuple[list[CauseFigures], list[SizeFigures]]:
    """Return the figures by cause and by size for rows in memory."""
    causes: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"ids": set(), "proven": set(), "inferred": set(), "over": 0, "under": 0}
    )
    sizes: dict[int, tuple[int, int]] = {}
    for number, row in enumerate(rows):
        over, under = sizes.get(len(str(abs(row.drift))), (0, 0))
        sizes[len(str(abs(row.drift)))] = (over + (row.drift > 0), under + (row.drift <= 0))
        whole: list[dict[str, Any]] = [{"cause": row.cause, "tokens": row.drift, "certainty": row.certainty}]
        for part in row.evidence.get("components") or whole:
            figures = causes[part["cause"]]
            figures["ids"].add(number)
            if part["certainty"] in ("proven", "inferred"):
                figures[part["certainty"]].add(number)
            figures["over" if part["tokens"] > 0 else "under"] += abs(part["tokens"])
    tallied = [
        CauseFigures(
            cause=cause,
            drifts=len(figures["ids"]),
            proven=len(figures["proven"]),
            inferred=len(figures["inferred"]),
            tokens_overstated=figures["over"],
            tokens_understated=figures["under"],
        )
        for cause, figures in causes.items()
    ]
    return sorted(tallied, key=lambda figures: (-figures.tokens, figures.cause)), _sizes(sizes)


def _sizes(by_digits: dict[int, tuple[int, int]]) -> list[SizeFigures]:
    if not by_digits:
        return []
    return [
        SizeFigures(at_least=10 ** (digits - 1), overstated=over, understated=under)
        for digits in range(min(by_digits), max(by_digits) + 1)
        for over, under in [by_digits.get(digits, (0, 0))]
    ]
