"""Tell a counter's story in sentences: each entry of the journal, and each log row that has none. Pure."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from trueup.drift.causes import cause_sentence
from trueup.drift.findings import BrokenChainError, Found
from trueup.drift.matching import match_pairs
from trueup.drift.story import Entry, Story, Usage, moment


@dataclass(frozen=True, kw_only=True)
class Told:
    """One change of the counter, or a log row without one. `at`: ISO 8601, UTC. `tokens`: the drift that it caused.

    `entry_id` None: a log row without an entry.
    """

    at: str
    sentence: str
    tokens: int = 0
    entry_id: int | None = None


def tell(story: Story, *, most: int) -> list[Told]:
    """Return the newest `most` events of a story, oldest first. If the journal has a hole, entries have no reasons."""
    entries = list(story.entries)[int(story.has_context) :]
    found: list[Found] = []
    pairs: list[tuple[Entry, Usage]] = []
    with suppress(BrokenChainError):
        found, pairs = match_pairs(story)
    reasons: dict[int, list[Found]] = {}
    for one in found:
        if one.entries:
            reasons.setdefault(one.entries[0].id, []).append(one)
    rows = {entry.id: row for entry, row in pairs}
    events = [(entry.at, _of_entry(entry, rows.get(entry.id), reasons.get(entry.id, []))) for entry in entries]
    events += [(one.at, _of_row(one)) for one in found if not one.entries]
    return [told for _, told in sorted(events, key=lambda event: event[0])][-most:]


def _of_entry(entry: Entry, row: Usage | None, reasons: list[Found]) -> Told:
    parts = [*_changes(entry), *_reasons(entry, row, reasons)]
    tokens = sum(one.tokens for one in reasons)
    return Told(at=moment(entry.at), sentence=": ".join(parts) + ".", tokens=tokens, entry_id=entry.id)


def _changes(entry: Entry) -> Iterator[str]:
    by = f" by {entry.application!r}" if entry.application and entry.writer == "host" else ""
    match entry.kind:
        case "created":
            yield f"The subscription began with {entry.written(entry.new):,}{by}"
        case "deleted":
            yield f"The subscription ended with {entry.written(entry.old):,}{by}"
        case _:
            yield f"{entry.written(entry.old):,} → {entry.written(entry.new):,}{by}"


def _reasons(entry: Entry, row: Usage | None, reasons: list[Found]) -> Iterator[str]:
    if entry.writer == "correction":
        yield "trueup set the counter right, or a person decided"
        return
    if row is not None:
        who = "trueup charged" if entry.writer == "charge" else "subtracted"
        yield f"{who} the {row.tokens:,} tokens of log row {row.id}"
    for one in reasons:
        yield f"{cause_sentence(one.cause)} ({one.tokens:+,})"
    if row is None and not reasons and entry.change and entry.kind == "changed":
        yield "a purchase or a grant, which the figures include" if entry.change > 0 else "no reason is known"


def _of_row(found: Found) -> Told:
    rows = ", ".join(f"log row {row['log_id']}" for row in found.rows if "log_id" in row)
    what = f"{rows}: " if rows else ""
    reason = "its decrement may still arrive" if found.is_young else cause_sentence(found.cause)
    return Told(
        at=moment(found.at),
        sentence=f"No change of the counter. {what}{reason} ({found.tokens:+,}).",
        tokens=found.tokens,
    )
