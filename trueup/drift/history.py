"""Explain a drift by the journal: what happened since the counter was last known. Pure: drift in, explanation out.

The last known point (the anchor) is the newest drift row, a correction, a decision, a run that found the counter
right, or the beginning of the period. What a drift row named then is still part of the drift, unless it was corrected.
The rest follows from the entries and rows since.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trueup.drift import weights
from trueup.drift.causes import Cause, Component, Explanation
from trueup.drift.detect import Drift
from trueup.drift.evidence import moment_of
from trueup.drift.findings import BrokenChainError, Found
from trueup.drift.journal_rules import PAYMENT_HORIZON
from trueup.drift.matching import match_pairs
from trueup.drift.pairing import HORIZON
from trueup.drift.story import Decrement, Entry, Grant, Payment, Story, Usage, moment, shown

# The SQL reads at most so many entries and rows.
MOST = 20_000
# These are put together by cause; each other finding may need a decision of its own.
TOGETHER = frozenset(
    {
        *("missed_decrement", "stale_write", "double_decrement", "failed_usage_charged", "clamped_at_zero"),
        *("host_decremented_our_charge", "grant_not_in_counter"),
    }
)
MAX_COMPONENTS = 40
# Seconds. A host's transaction that logs a request takes less.
RECENT = 60.0
# Seconds. A host may begin a period at midnight of its zone.
NEW_PERIOD = 26 * 3_600.0


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """The last known point. `carried`: the components that were not corrected. `pending`: log rows without a decrement.

    `recent`: the log rows of the last minute that were there; None: not known. `position`: the last entry then; None:
    by time. `is_clean`: a run compared everything after this time, so a pair of entry and row on its two sides is no
    drift. `begins_period`: the entry at `position` began the present period.
    """

    at: float
    position: int | None = None
    carried: tuple[Component, ...] = ()
    pending: frozenset[str] = frozenset()
    recent: frozenset[str] | None = None
    is_clean: bool = False
    begins_period: bool = False

    def is_after(self, entry: Entry) -> bool:
        return entry.at > self.at if self.position is None else entry.id > self.position

    def is_new(self, row: str, at: float) -> bool:
        """Return whether the log row counts since the anchor. A row gets its time before its commit."""
        if at > self.at or row in self.pending:
            return True
        return self.recent is not None and at > self.at - RECENT and row not in self.recent


def journal_position(drift: Drift, *, in_flight: bool, pending: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the evidence with which the next run goes on; empty without a journal.

    `pending` None: if tokens are in flight, the recent rows without an entry are pending.
    """
    story = drift.story
    if story is None:
        return {}
    if pending is None:
        pending = _without_entry(drift, story) if in_flight else ()
    recent = [row[0] for row in story["usage"] if float(row[2]) > drift.seen_at.timestamp() - RECENT]
    position = {"position": story["last_entry"] or 0, "at": story["snapshot_at"]}
    return {"journal": position | {"pending": sorted(pending), "recent": sorted(recent)}}


def _without_entry(drift: Drift, document: dict[str, Any]) -> list[str]:
    """Return the young log rows whose decrement has not come; all young ones if the journal has a hole."""
    story = story_of(drift, document, frozenset())
    try:
        paired = {row.id for _, row in match_pairs(story)[1]}
    except BrokenChainError:
        paired = set()
    return [row.id for row in story.usage if row.at >= story.young_since and row.id not in paired]


def explain_by_journal(drift: Drift, plan_sizes: frozenset[int]) -> Explanation | None:
    """Return the causes of a drift by the journal.

    None: it does not reach back to the last known point, it has a hole, or it does not account for the whole drift.
    """
    document = drift.story
    if document is None or drift.is_negative or max(len(document["entries"]), len(document["usage"])) >= MOST:
        return None
    story = story_of(drift, document, plan_sizes)
    anchor = _repeated_anchor(story, document) if document["repeats"] else _anchor(story, document)
    if anchor is None:
        return None
    try:
        found = list(_since(anchor, story, document))
        rest = drift.surplus - sum(part.tokens for part in anchor.carried) - sum(one.tokens for one in found)
        later = _later_in_run(story, document, drift.surplus) if rest and anchor.is_clean else None
        if later is not None:
            anchor = later
            found, rest = list(_since(anchor, story, document)), 0
    except BrokenChainError:
        return None
    if rest:
        more = _rest(anchor, story, rest)
        if more is None:
            return None
        found.append(more)
    young = [one for one in found if one.is_young]
    parts = (*anchor.carried, *_components([one for one in found if not one.is_young]))
    causes = {part.cause for part in parts}
    names = dict.fromkeys(name for part in parts for name in part.alternatives if name not in causes)
    position = journal_position(drift, in_flight=True, pending=[str(one.rows[0]["log_id"]) for one in young])
    return Explanation(
        components=parts,
        alternatives=tuple(names),
        in_flight=sum(one.tokens for one in young),
        evidence={**drift.figures, **position},
        by_component=True,
    )


def _entry(row: Sequence[Any], document: dict[str, Any], *, counts_up: bool) -> Entry:
    number, old, new, at, kind, window, plan, transaction, application, writer = row
    sign = -1 if counts_up else 1
    return Entry(
        id=number, old=sign * old, new=sign * new, at=float(at), kind=kind, plan=plan,
        # Periods that repeat begin without a change of the subscription: see _repeated_anchor().
        window="" if document["repeats"] else window,
        # A plan does not change how much is used.
        plan_tokens=0 if counts_up else document["plans"].get(plan),
        transaction=transaction, application=application, writer=writer, counts_up=counts_up,
    )  # fmt: skip


def story_of(drift: Drift, document: dict[str, Any], plan_sizes: frozenset[int]) -> Story:
    """Return the story that `trueup.counter_stories` has read, for the counter of `drift`."""
    entries = [_entry(row, document, counts_up=drift.counts_up) for row in document["entries"]]
    context = _entry(document["context"], document, counts_up=drift.counts_up) if document["context"] else None
    ended = drift.end_date.timestamp() if drift.end_date and drift.end_date < drift.seen_at else None
    return Story(
        entries=[context, *entries] if context else entries,
        has_context=context is not None,
        usage=[
            Usage(id=row[0], tokens=row[1], at=float(row[2]), counts=row[3], own=row[4], section=row[5])
            for row in document["usage"]
        ],
        decrements=[
            Decrement(id=row[0], tokens=row[1], at=float(row[2]), description=row[3]) for row in document["decrements"]
        ],
        payments=[
            Payment(id=row[0], tokens=row[1], at=float(row[2]), own_plan=bool(row[3]), granted=row[4])
            for row in document["payments"]
        ],
        payments_mapped=document.get("payments_mapped", drift.evidence.purchases_mapped),
        grants=[Grant(id=row[0], tokens=row[1], at=float(row[2])) for row in document["grants"] if not drift.counts_up],
        plan_sizes=plan_sizes,
        young_since=drift.seen_at.timestamp() - document["min_age"],
        ended_at=ended if drift.is_active else 0.0,
        stops_at_zero=not drift.counts_up,
    )


def _new_period(context: Entry | None, entries: Sequence[Entry]) -> int | None:
    """Return the place of the last entry of the transaction that began the present period; None: an earlier one did."""
    before, begun = context, None
    for place, entry in enumerate(entries):
        if entry.kind == "created" or (before is not None and entry.window != before.window):
            begun = place
        before = entry
    if begun is None:
        return None
    while begun + 1 < len(entries) and entries[begun + 1].transaction == entries[begun].transaction:
        begun += 1
    return begun


def _anchor(story: Story, document: dict[str, Any]) -> Anchor | None:
    kind, at = document["kind"], document["at"]
    entries = story.entries[int(story.has_context) :]
    begun = _new_period(story.entries[0] if story.has_context else None, entries)
    if begun is not None and (kind == "window" or entries[begun].at > float(at)):
        first, began = entries[begun], moment_of(entries[begun].window)
        # A subscription that was imported, or whose period began long before, has a past that no entry shows.
        used_before = any(row[3] and float(row[2]) < first.at - HORIZON for row in document["usage"])
        if began is None or first.at - began.timestamp() > NEW_PERIOD or used_before:
            return None
        return Anchor(at=first.at, position=first.id, begins_period=True)
    if kind == "window" or float(at) < float(document["journal_since"]):
        return None
    return _anchor_in_period(document)


def _repeated_anchor(story: Story, document: dict[str, Any]) -> Anchor | None:
    """Return the last known point of a counter whose periods repeat. None: the journal does not tell it."""
    at = float(document["at"])
    if any(entry.kind != "changed" for entry in story.entries[int(story.has_context) :]):
        return None
    if document["kind"] != "window":
        return None if at < float(document["journal_since"]) else _anchor_in_period(document)
    entries = [entry for entry in story.entries if entry.at >= at]
    before = next((entry for entry in reversed(story.entries) if entry.at < at), None)
    if before is None:
        return None
    reset = next((entry for entry in entries if entry.change and entry.new == entry.plan_tokens), None)
    if reset is not None:
        return Anchor(at=reset.at, position=reset.id, begins_period=True)
    if before.plan_tokens is None or any(entry.change > 0 and entry.writer == "host" for entry in entries):
        return None  # a purchase, perhaps
    carried: tuple[Component, ...] = ()
    if before.new != before.plan_tokens:
        evidence = {"note": "the counter still shows the period before", "entries": [shown(before)]}
        tokens = before.new - before.plan_tokens
        carried = (Component(cause="period_reset", tokens=tokens, certainty="inferred", evidence=evidence),)
    return Anchor(at=at, position=before.id, carried=carried)


def _anchor_in_period(document: dict[str, Any]) -> Anchor:
    kind, at = document["kind"], document["at"]
    if kind != "drift":
        return Anchor(at=float(at), is_clean=kind == "run")
    seen = document["seen"]
    evidence = seen["evidence"]
    rows = [] if seen["action"] == "corrected" else evidence.get("components", [])
    rows = rows + (evidence.get("held_components", []) if seen["action"] == "lost_race" else [])
    carried = [Component.from_json(row) for row in rows]
    if not rows and seen["action"] != "corrected":
        tokens = (seen["observed"] or 0) - (evidence["original"] - evidence["consumed"]) - evidence.get("in_flight", 0)
        others = tuple(evidence.get("alternatives", ()))
        whole = Component(cause="unexplained", tokens=tokens, certainty="possible", alternatives=others)
        carried = [whole] if tokens else []
    if seen["action"] == "ignored":
        carried = [replace(part, is_ignored=True) for part in carried]
    if seen["action"] == "review":
        carried = [replace(part, is_held=True) for part in carried]
    return Anchor(
        at=float(at),
        position=document["position"],
        carried=tuple(carried),
        pending=frozenset(evidence["journal"]["pending"]),
        recent=frozenset(evidence["journal"]["recent"]),
    )


def _later_in_run(story: Story, document: dict[str, Any], surplus: int) -> Anchor | None:
    """Return the last moment of a run at which the counter was right and nothing was in flight; None: there was none.

    The run found the counter right when it compared it. When the run began, the counter may have been wrong. The drift
    at each moment is the drift now (`surplus`), less the changes and log rows since.
    """
    began, ended = float(document["at"]), float(document["ended"])
    entries = [entry for entry in story.entries if entry.at >= began]
    if not entries or story.grants or len({(entry.window, entry.plan) for entry in entries}) > 1:
        return None
    events = [(entry.at, entry.change) for entry in entries]
    events += [(row.at, row.tokens) for row in story.usage if row.counts and row.at >= began]
    events.sort()
    in_flight = [sorted((entry.at, row.at)) for entry, row in match_pairs(story)[1]]
    after = float("inf")
    for at, tokens in reversed(events):
        is_quiet = not any(first <= at < last for first, last in in_flight)
        if not surplus and at < after and at <= ended and is_quiet:
            position = max((entry.id for entry in story.entries if entry.at <= at), default=0)
            return Anchor(at=at, position=position)
        surplus -= tokens
        after = at
    return None


def _since(anchor: Anchor, story: Story, document: dict[str, Any]) -> Iterator[Found]:
    """Yield the causes of drift since the anchor."""
    corrected = _correction(anchor, story, document)
    entries = story.entries
    if anchor.begins_period:
        place = next(place for place, entry in enumerate(entries) if entry.id == anchor.position)
        yield from _of_period(story, place, repeats=document["repeats"])
        entries = story.entries[place:]
        story = replace(story, has_context=True)
    found, pairs = match_pairs(replace(story, entries=entries))
    for one in found:
        if one.entries and one.entries[0].id == corrected:
            continue  # trueup's correction is no cause: it is what the anchor says
        if anchor.is_after(one.entries[0]) if one.entries else _is_new(anchor, one):
            yield one
    if anchor.is_clean or anchor.begins_period:
        return
    for entry, row in pairs:
        row_is_after = anchor.is_new(row.id, row.at)
        if anchor.is_after(entry) and not row_is_after:
            note = "trueup had counted this log row as missed before its decrement came"
            yield Found(cause="double_decrement", tokens=-row.tokens, at=entry.at, entries=(entry,), note=note)
        elif row_is_after and not anchor.is_after(entry):
            note = "its decrement came before the log row"
            yield Found(cause="missed_decrement", tokens=row.tokens, at=row.at, entries=(entry,), note=note)


def _correction(anchor: Anchor, story: Story, document: dict[str, Any]) -> int | None:
    """Return the entry by which trueup wrote what the anchor says; None: it wrote nothing."""
    seen = document["seen"] if document["kind"] == "drift" else None
    if seen is not None and seen["action"] != "corrected" and not seen["evidence"].get("after_correction"):
        return None
    if document["kind"] in ("run", "window"):
        return None
    after = (entry for entry in story.entries if entry.writer == "correction" and anchor.is_after(entry))
    return next((entry.id for entry in after), None)


def _is_new(anchor: Anchor, found: Found) -> bool:
    """Return whether a log row without an entry came after the anchor."""
    names = [str(row["log_id"]) for row in found.rows if "log_id" in row]
    return any(anchor.is_new(name, found.at) for name in names) or found.at > anchor.at


def _of_period(story: Story, place: int, *, repeats: bool) -> Iterator[Found]:
    """Yield how much the counter differed from the plan when the period began."""
    entry = story.entries[place]
    first = place
    while first and story.entries[first - 1].transaction == entry.transaction:
        first -= 1
    old = story.entries[first].old
    used = sum(row.tokens for row in story.usage if row.counts and row.at <= entry.at)
    off = entry.new - ((entry.plan_tokens or 0) - used)
    if not off:
        return
    more = {"counter_before": entry.written(old), "plan_tokens": entry.plan_tokens}
    if repeats and off == used:
        note = "the counter was set to its full value after this usage of the period"
        others = ("credit_without_grant",) if _may_be_bought(story, off, entry.at) else ()
        yield Found(cause="period_reset", tokens=off, at=entry.at, entries=(entry,), note=note, certainty="inferred",
                    others=others, more=more)  # fmt: skip
        return
    cause: Cause = "carried_over_tokens" if 0 < off <= old else "manual_edit"
    note = "the counter was not set to the plan's tokens when this period began"
    yield Found(
        cause=cause, tokens=off, at=entry.at, entries=(entry,), note=note, certainty="inferred", more=more,
    )  # fmt: skip


def _may_be_bought(story: Story, tokens: int, at: float) -> bool:
    return tokens in story.plan_sizes or any(
        one.tokens == tokens and abs(one.at - at) <= PAYMENT_HORIZON for one in story.payments
    )


def _rest(anchor: Anchor, story: Story, rest: int) -> Found | None:
    """Return what the entries and rows since the anchor do not account for, such as usage beyond the plan before it.

    None: something else happened, for example the host backdated log rows. Then rows and sizes explain the drift.
    """
    after = next((entry for entry in story.entries if anchor.is_after(entry)), None)
    value = after.old if after else (story.entries[-1].new if story.entries else None)
    if rest > 0 and value == 0 and story.stops_at_zero:
        note = "the counter was at zero already, and the usage was larger than the plan"
        return Found(cause="clamped_at_zero", tokens=rest, at=anchor.at, certainty="inferred", note=note)
    return None


def _components(found: Sequence[Found]) -> list[Component]:
    """Put findings of one cause together; an edit or a purchase stays a component of its own."""
    groups: dict[tuple[Any, ...], list[Found]] = defaultdict(list)
    several = len(found) <= MAX_COMPONENTS
    for place, one in enumerate(found):
        own = place if one.cause not in TOGETHER and several else -1
        groups[one.cause, one.certainty, one.others, own].append(one)
    return [part for group in groups.values() if (part := _component(group)).tokens]


def _component(group: Sequence[Found]) -> Component:
    rows = [row for one in group for row in one.rows][: weights.MAX_ROWS]
    entries = [shown(entry) for one in group for entry in one.entries][: weights.MAX_ROWS]
    notes = dict.fromkeys(one.note for one in group if one.note)
    proof: dict[str, Any] = {"count": len(group), "at": moment(group[0].at)}
    proof |= {"entries": entries} if entries else {}
    proof |= {"rows": rows} if rows else {}
    proof |= {"note": "; ".join(notes)} if notes else {}
    proof |= {"writers": _writers(group)} if group[0].cause == "stale_write" else {}
    return Component(
        cause=group[0].cause,
        tokens=sum(one.tokens for one in group),
        certainty=group[0].certainty,
        alternatives=group[0].others,
        evidence={**proof, **group[0].more},
    )


def _writers(group: Sequence[Found]) -> list[dict[str, Any]]:
    """Return who made the stale writes: by application, section and description, how many, and how many tokens.

    `application_name` None: the write left no entry, because it wrote the value that the counter had already.
    """
    writes: dict[tuple[str | None, str, str], list[Found]] = defaultdict(list)
    for one in group:
        writes[one.entries[0].application if one.entries else None, one.section, one.description].append(one)
    return [
        {
            "application_name": application,
            "section": section,
            "description": description,
            "count": len(found),
            "tokens": sum(abs(one.tokens) for one in found),
            "first_at": moment(min(one.at for one in found)),
        }
        for (application, section, description), found in writes.items()
    ]
